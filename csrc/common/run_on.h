// Where an operator runs: on torch's threads, or on the GPU that holds its tensors.
#pragma once

#include <utility>
#include <vector>

#include "common/gpu.h"
#include "common/torch_op.h"

#ifdef FASTIF_CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

// In libtorch_cuda, which a CUDA build links; torch's shim.h declares it under USE_CUDA alone.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace fastif {

#ifdef FASTIF_CUDA
// Makes a tensor's GPU current, with torch's current stream, for as long as the operator launches
// kernels. Scratch memory comes from torch's allocator, which hands it on in stream order: it may
// be freed before the kernels have run.
class OnGpu {
 public:
  explicit OnGpu(const Tensor& where) : guard_(where.get_device_index()), device_(where.device()) {
    int multiprocessors = 0;
    STD_TORCH_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                           device_.index()) == cudaSuccess,
                    "fastif_ext: cannot ask CUDA device ", int(device_.index()),
                    " for its multiprocessors");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_.index(), &stream));
    gpu_ = Gpu{stream, multiprocessors,
               [](void* self, int64_t bytes) { return static_cast<OnGpu*>(self)->allocate(bytes); },
               this};
  }
  OnGpu(const OnGpu&) = delete;
  OnGpu& operator=(const OnGpu&) = delete;

  const Gpu& gpu() const { return gpu_; }

 private:
  // torch's own error does not come through its C interface: this one says what was asked for.
  void* allocate(int64_t bytes) try {
    scratch_.push_back(torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, device_));
    return scratch_.back().mutable_data_ptr();
  } catch (const std::exception& error) {
    STD_TORCH_CHECK(
        false, "fastif_ext: CUDA out of memory: device ", int(device_.index()), " has no ", bytes,
        " bytes for scratch; free memory, or pass fewer rows at once (", error.what(), ")");
    return nullptr;
  }

  torch::stable::accelerator::DeviceGuard guard_;
  torch::stable::Device device_;
  std::vector<Tensor> scratch_;
  Gpu gpu_;
};
#endif

// Calls on_cpu(pool), or on_gpu(gpu) if the tensor lies on a GPU. on_gpu takes `const auto&`, so
// that a build without CUDA does not ask for the kernels it calls.
template <class OnCpu, class OnDevice>
auto run_on([[maybe_unused]] const Tensor& where, OnCpu&& on_cpu,
            [[maybe_unused]] OnDevice&& on_gpu) {
#ifdef FASTIF_CUDA
  if (where.is_cuda()) return on_gpu(OnGpu(where).gpu());
#endif
  return on_cpu(torch_pool());
}

}  // namespace fastif

// Registers one function as an operator's kernel on every device that this build knows.
#ifdef FASTIF_CUDA
#define FASTIF_REGISTER(name, function)                                                 \
  STABLE_TORCH_LIBRARY_IMPL(fastif_ext, CPU, m) { m.impl(name, TORCH_BOX(&function)); } \
  STABLE_TORCH_LIBRARY_IMPL(fastif_ext, CUDA, m) { m.impl(name, TORCH_BOX(&function)); }
#else
#define FASTIF_REGISTER(name, function) \
  STABLE_TORCH_LIBRARY_IMPL(fastif_ext, CPU, m) { m.impl(name, TORCH_BOX(&function)); }
#endif
