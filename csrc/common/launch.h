// What every *_cuda.cu file starts from: CUDA itself, or the simulator of csrc/tests for a C++
// compiler, and the one way to launch a kernel.
#pragma once

#include <stdexcept>
#include <string>

#include "common/gpu.h"
#include "common/parallel.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
// The block's dynamic shared memory.
#define FASTIF_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char fastif_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(fastif_dynamic_shared)
#else
#include "tests/cpusim.h"
#define FASTIF_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(cpusim::dynamic_shared())
#endif

namespace fastif {

constexpr unsigned kWarp = 32, kWholeWarp = 0xffffffffu;

inline void check_cuda(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  std::string message =
      std::string("fastif_ext::") + op + ": CUDA error: " + cudaGetErrorString(status);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction)
    message +=
        "; this build has no code for this GPU (fastif_ext.build_info() lists its architectures): "
        "rebuild with TORCH_CUDA_ARCH_LIST set to the GPU's";
  throw std::runtime_error(message);
}

// Runs kernel(args...) on `blocks` blocks of `threads`; nothing where there are no blocks. Blocks
// of more than 48 kB of dynamic shared memory are allowed for first.
template <class... P, class... A>
void launch(const char* op, [[maybe_unused]] const Gpu& gpu, void (*kernel)(P...), dim3 blocks,
            dim3 threads, size_t shared, A... args) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
#ifdef __CUDACC__
  if (shared > 48 * 1024) {
    check_cuda(
        op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  }
  kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(gpu.stream)>>>(P(args)...);
#else
  cpusim::launch(blocks, threads, shared, [&] { kernel(P(args)...); });
#endif
  check_cuda(op, cudaGetLastError());
}

// Sets memory of the device, in stream order.
inline void fill_bytes(const char* op, const Gpu& gpu, void* memory, int value, int64_t bytes) {
  check_cuda(op,
             cudaMemsetAsync(memory, value, size_t(bytes), static_cast<cudaStream_t>(gpu.stream)));
}

// Blocks for `items` when each takes `per_block`, at most `most`: kernels stride over the rest.
inline unsigned grid_size(int64_t items, int64_t per_block, int64_t most) {
  return unsigned(std::min(ceil_div(items, per_block), most));
}

}  // namespace fastif
