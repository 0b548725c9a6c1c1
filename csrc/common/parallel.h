// The thread pool a kernel is handed by its caller, so that kernels need no torch header.
//
// A kernel cuts its work into tasks that depend on the shapes alone, never on the number of
// threads, and combines their results in task order: results are then the same for any number of
// threads.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastif {

struct Pool {
  // Runs task(context, 0) ... task(context, tasks - 1), in any order, on any threads.
  void (*run)(int64_t tasks, void (*task)(void* context, int64_t index), void* context);
};

template <class Body>
void parallel_tasks(const Pool& pool, int64_t tasks, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  pool.run(
      tasks, [](void* context, int64_t index) { (*static_cast<Plain*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastif
