// What every *_op.cpp shares: torch's stable ABI, checks, dtype dispatch, torch's thread pool.
//
// Only *_op.cpp files include this. The Python functions in fastif_ext/ops check their arguments
// and explain; the checks here keep a direct torch.ops call from reading past a buffer.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <exception>
#include <mutex>

#include "common/numeric_types.h"
#include "common/parallel.h"

namespace fastif {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch's intra-op threads. Two tasks at least, so that a body always runs inside a parallel region
// and a GEMM it calls stays on one thread: its result is then the same for any number of threads.
// An exception of a task is carried to the caller: torch's C interface would lose its message.
inline Pool torch_pool() {
  return Pool{[](int64_t tasks, void (*task)(void*, int64_t), void* context) {
    std::exception_ptr failure;
    std::mutex mutex;
    torch::stable::parallel_for(0, std::max<int64_t>(tasks, 2), 1, [&](int64_t begin, int64_t end) {
      try {
        for (int64_t i = begin; i < std::min(end, tasks); ++i) task(context, i);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!failure) failure = std::current_exception();
      }
    });
    if (failure) std::rethrow_exception(failure);
  }};
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls body(T{}) with the element type T of a floating-point tensor.
template <class Body>
auto dispatch_floating(const char* op, ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Half:
      return body(Half{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "fastif_ext::", op,
                      ": expected float32, float64, float16 or bfloat16 input");
      return body(float{});
  }
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape,
                         ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

}  // namespace fastif
