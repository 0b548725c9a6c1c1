// The GPU a CUDA kernel is handed by its caller, so that kernels need no torch header: what Pool is
// to a CPU kernel.
//
// A kernel launches all its work on `stream` of the current device and never waits for it: an
// operator can be captured in a CUDA graph. Its results are functions of the inputs alone, whatever
// the order of blocks: fixed partitions, ordered reductions, no floating-point atomics.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastif {

struct Gpu {
  void* stream;         // cudaStream_t
  int multiprocessors;  // how many blocks fill the device; results must not depend on it
  // Device memory that no one else uses before the operator's work on the stream is done, aligned
  // to 256 bytes, not initialised.
  void* (*allocate)(void* context, int64_t bytes);
  void* context;

  template <class T>
  T* scratch(int64_t count) const {
    const int64_t bytes = std::max<int64_t>(count, 1) * int64_t(sizeof(T));
    return static_cast<T*>(allocate(context, bytes));
  }
};

}  // namespace fastif
