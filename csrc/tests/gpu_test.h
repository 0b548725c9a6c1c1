// What the tests of CUDA kernels share. Such a test includes a *_cuda.cu file, so that its kernels
// are compiled for the simulator, and runs them under several thread orders: each must give the
// same bits.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "common/launch.h"
#include "tests/native_test.h"

namespace fastif::test {

// A GPU whose memory is the host's. Scratch memory is poisoned, of the exact size, so that the
// sanitizers see what is read before it is written or past its end.
class SimulatedGpu {
 public:
  explicit SimulatedGpu(int multiprocessors = 3)
      : gpu_{nullptr, multiprocessors,
             [](void* self, int64_t bytes) {
               return static_cast<SimulatedGpu*>(self)->allocate(bytes);
             },
             this} {}
  ~SimulatedGpu() {
    for (void* block : blocks_) std::free(block);
  }
  SimulatedGpu(const SimulatedGpu&) = delete;
  SimulatedGpu& operator=(const SimulatedGpu&) = delete;

  operator const Gpu&() const { return gpu_; }

 private:
  void* allocate(int64_t bytes) {
    void* block = nullptr;
    if (posix_memalign(&block, 256, size_t(bytes)) != 0) std::abort();
    std::memset(block, 0xA5, size_t(bytes));
    blocks_.push_back(block);
    return block;
  }

  Gpu gpu_;
  std::vector<void*> blocks_;
};

// run(gpu) under every thread order, on GPUs of several sizes; the results must be equal, and are
// returned.
template <class Run>
auto on_simulated_gpus(Run&& run) {
  cpusim::machine.order = 0;
  const auto result = run(SimulatedGpu(3));
  for (unsigned order : {1u, 2u, 3u}) {
    cpusim::machine.order = order;
    EXPECT(run(SimulatedGpu(int(order) * 7)) == result, "thread order %u changed the result",
           order);
  }
  return result;
}

}  // namespace fastif::test
