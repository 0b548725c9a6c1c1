// Copies from global to shared memory that run while the thread goes on (cp.async, sm_80). Only
// *_cuda.cu files include this.
//
// The simulator's twin copies at once under odd thread orders and as late as the waits allow under
// even ones, so that it sees both a buffer that is overwritten too early and one read too soon.
#pragma once

#include <cstdint>

#include "common/launch.h"

namespace fastif {
namespace {

#ifndef __CUDACC__
struct PendingCopies {
  struct Copy {
    void* to;
    const void* from;
    int size, valid;
    void run() const {
      std::memset(to, 0, size_t(size));
      if (valid > 0) std::memcpy(to, from, size_t(valid));
    }
  };
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;

  static PendingCopies& mine() {
    static PendingCopies of_thread[1024];
    return of_thread[threadIdx.x];
  }
  void wait(size_t left) {
    while (groups.size() > left) {
      for (const Copy& copy : groups.front()) copy.run();
      groups.erase(groups.begin());
    }
  }
};
#endif

// kSize bytes, 4 or 16, both addresses aligned to it: the first `valid` of `from`, then zeros.
template <int kSize>
__device__ __forceinline__ void copy_async(void* to, const void* from, int valid) {
#ifdef __CUDACC__
  const unsigned shared = unsigned(__cvta_generic_to_shared(to));
  if constexpr (kSize == 16) {  // .cg: past the L1 cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
                 "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(from), "r"(valid)
                 : "memory");
  }
#else
  const PendingCopies::Copy copy{to, from, kSize, valid};
  if ((valid > 0 && reinterpret_cast<uintptr_t>(from) % kSize) ||
      reinterpret_cast<uintptr_t>(to) % kSize)
    cpusim::fail("copy_async: an address is not aligned", cpusim::machine.current);
  if (cpusim::machine.order % 2 == 1) {
    copy.run();
  } else {
    PendingCopies::mine().open.push_back(copy);
  }
#endif
}

// Closes the group of this thread's copies since the last call.
__device__ __forceinline__ void close_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  PendingCopies& pending = PendingCopies::mine();
  pending.groups.push_back(std::move(pending.open));
  pending.open.clear();
#endif
}

// Waits for all but the last kLeft groups of this thread; a barrier must follow before others read.
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
  PendingCopies::mine().wait(kLeft);
#endif
}

}  // namespace
}  // namespace fastif
