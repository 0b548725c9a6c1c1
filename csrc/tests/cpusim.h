// Runs CUDA kernels on the CPU, so that their logic is tested where there is no GPU: a .cu file is
// compiled as C++, blocks run one after the other, each thread of a block is a fiber.
//
// It sees: results, out-of-bounds accesses (with AddressSanitizer), barriers that not all threads
// reach, divergent warp operations, shuffles from lanes that do not take part, and - by running the
// threads between two barriers in several orders - most missing barriers. It cannot see races
// between blocks, timing or registers. Tensor-core and asynchronous-copy instructions need a plain
// twin behind a small device function. x86-64 only.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __constant__
#define __shared__ static  // one block runs at a time; AddressSanitizer puts red zones around it

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// The runtime functions that kernels' callers use. Memory is the host's, work is done at once.
using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidDeviceFunction,
  cudaErrorNoKernelImageForDevice,
};
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

extern "C" void cpusim_switch(void** save, void* load);
asm(R"(.text
.weak cpusim_switch
.type cpusim_switch,@function
cpusim_switch:
 pushq %rbp
 pushq %rbx
 pushq %r12
 pushq %r13
 pushq %r14
 pushq %r15
 movq %rsp,(%rdi)
 movq %rsi,%rsp
 popq %r15
 popq %r14
 popq %r13
 popq %r12
 popq %rbx
 popq %rbp
 ret
)");

namespace cpusim {

enum class State { kReady, kBlockBarrier, kWarpBarrier, kDone };

struct Fiber {
  void* stack_pointer;
  char* stack;
  dim3 thread;
  unsigned linear;  // thread's number in its block
  State state;
  unsigned mask;  // of the warp operation it waits at
  int line;
  void* fake_stack;  // AddressSanitizer's
  uint64_t slot;     // what it offers to a shuffle
};

constexpr size_t kStack = 128 << 10;

struct Machine {
  std::vector<Fiber> fibers;
  Fiber* current;
  void* scheduler;
  void* scheduler_fake_stack;
  const void* scheduler_bottom;
  size_t scheduler_size;
  dim3 block, block_dim, grid_dim;
  unsigned char* dynamic;
  const std::function<void()>* body;
  // The order of threads: 0 ascending, 1 descending, else random, drawn anew at each barrier; from
  // 3 on half the warps rest each time, so that warps get ahead of one another.
  unsigned order = 0;
};
inline Machine machine;

inline unsigned char* dynamic_shared() { return machine.dynamic; }

[[noreturn]] inline void fail(const char* message, const Fiber* f) {
  std::fprintf(stderr, "cpusim: %s: block (%u,%u,%u) thread (%u,%u,%u) line %d mask %08x\n",
               message, machine.block.x, machine.block.y, machine.block.z, f->thread.x, f->thread.y,
               f->thread.z, f->line, f->mask);
  std::abort();
}

inline void to_scheduler(bool dying = false) {
  Fiber* me = machine.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(dying ? nullptr : &me->fake_stack, machine.scheduler_bottom,
                                 machine.scheduler_size);
#endif
  (void)dying;
  cpusim_switch(&me->stack_pointer, machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me->fake_stack, &machine.scheduler_bottom,
                                  &machine.scheduler_size);
#endif
}

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_bottom, &machine.scheduler_size);
#endif
  (*machine.body)();
  machine.current->state = State::kDone;
  to_scheduler(true);
  std::abort();
}

inline void resume(Fiber& f) {
  machine.current = &f;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, f.stack, kStack);
#endif
  cpusim_switch(&machine.scheduler, f.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline void block_sync(int line) {
  machine.current->state = State::kBlockBarrier;
  machine.current->line = line;
  to_scheduler();
}

inline void warp_sync(unsigned mask, int line) {
  Fiber* me = machine.current;
  me->mask = mask;
  me->line = line;
  if (!(mask >> (me->linear % 32) & 1)) fail("the caller's lane is not in its mask", me);
  me->state = State::kWarpBarrier;
  to_scheduler();
}

// Lets threads pass the barriers that all have reached; whether there were any.
inline bool release() {
  auto& fibers = machine.fibers;
  size_t waiting = 0, done = 0;
  bool any = false;
  const Fiber* first = nullptr;
  for (auto& f : fibers) {
    done += f.state == State::kDone;
    if (f.state != State::kBlockBarrier) continue;
    ++waiting;
    if (first == nullptr) first = &f;
  }
  if (waiting > 0 && waiting + done == fibers.size()) {
    for (auto& f : fibers) {
      if (f.state != State::kBlockBarrier) continue;
      if (f.line != first->line) fail("__syncthreads at different lines in one block", &f);
      f.state = State::kReady;
    }
    if (done > 0) fail("__syncthreads after some threads returned", first);
    any = true;
  }
  for (size_t warp = 0; warp < fibers.size(); warp += 32) {
    for (size_t i = warp; i < std::min(fibers.size(), warp + 32); ++i) {
      if (fibers[i].state != State::kWarpBarrier) continue;
      const unsigned mask = fibers[i].mask;
      bool all = true;
      for (unsigned lane = 0; lane < 32 && all; ++lane) {
        if (!(mask >> lane & 1)) continue;
        if (warp + lane >= fibers.size() || fibers[warp + lane].state == State::kDone)
          fail("the mask names a lane that has returned or does not exist", &fibers[i]);
        const Fiber& other = fibers[warp + lane];
        all = other.state == State::kWarpBarrier && other.mask == mask &&
              other.line == fibers[i].line;
      }
      for (unsigned lane = 0; all && lane < 32; ++lane)
        if (mask >> lane & 1) fibers[warp + lane].state = State::kReady;
      any |= all;
    }
  }
  return any;
}

inline void run_block(size_t threads, const std::vector<char*>& stacks, std::mt19937& engine) {
  auto& fibers = machine.fibers;
  const dim3 dim = machine.block_dim;
  std::vector<unsigned> order(threads);
  fibers.assign(threads, Fiber{});
  for (unsigned i = 0; i < threads; ++i) {
    order[i] = machine.order == 1 ? unsigned(threads) - 1 - i : i;
    Fiber& f = fibers[i];
    f.linear = i;
    f.stack = stacks[i];
    f.thread = dim3(i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y));
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(f.stack, kStack);
#endif
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(f.stack + kStack - 128) &
                                          ~uintptr_t{15});
    std::fill(top, top + 6, nullptr);  // the registers that cpusim_switch restores
    top[6] = reinterpret_cast<void*>(&enter);
    f.stack_pointer = top;
    f.state = State::kReady;
  }
  unsigned awake = ~0u;  // by warp
  while (true) {
    if (machine.order >= 2) std::shuffle(order.begin(), order.end(), engine);
    if (machine.order >= 3 && engine() % 64 == 0) awake = unsigned(engine());
    bool ran = false;
    size_t done = 0;
    for (unsigned i : order) {
      if (fibers[i].state != State::kReady) continue;
      ran = true;
      if (!(awake >> i / 32 & 1)) continue;
      resume(fibers[i]);
    }
    for (auto& f : fibers) done += f.state == State::kDone;
    if (done == threads) return;
    if (release() || ran) continue;
    for (auto& f : fibers)
      if (f.state != State::kDone) fail("deadlock at a barrier or a warp operation", &f);
  }
}

inline void launch(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || shared > 227 * 1024 || grid.y > 65535 || grid.z > 65535) {
    std::fprintf(stderr, "cpusim: no GPU can launch %zu threads with %zu bytes\n", threads, shared);
    std::abort();
  }
  static std::vector<char*> stacks;
  while (stacks.size() < threads) {
    stacks.push_back(static_cast<char*>(
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
  }
  std::mt19937 engine(machine.order);
  machine.grid_dim = grid;
  machine.block_dim = block;
  machine.body = &body;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        machine.block = dim3(x, y, z);
        // Of the exact size, so that AddressSanitizer sees overruns; aligned as on a GPU.
        void* memory = nullptr;
        if (posix_memalign(&memory, 128, std::max<size_t>(shared, 1)) != 0) std::abort();
        machine.dynamic = static_cast<unsigned char*>(memory);
        std::memset(machine.dynamic, 0xA5, shared);
        run_block(threads, stacks, engine);
        std::free(memory);
      }
    }
  }
}

template <class T>
T exchange(unsigned mask, T value, int source, int width, int line) {
  static_assert(sizeof(T) <= 8);
  Fiber* me = machine.current;
  const int lane = int(me->linear % 32), base = lane / width * width;
  std::memcpy(&me->slot, &value, sizeof(T));
  warp_sync(mask, line);
  if (source < base || source >= base + width) source = lane;
  if (!(mask >> source & 1)) fail("a shuffle reads a lane outside its mask", me);
  T result;
  std::memcpy(&result, &machine.fibers[me->linear / 32 * 32 + unsigned(source)].slot, sizeof(T));
  warp_sync(mask, line);
  return result;
}
enum class Shuffle { kIndex, kXor, kDown, kUp };
template <class T>
T shuffle(Shuffle kind, unsigned mask, T value, int argument, int line, int width = 32) {
  const int lane = int(machine.current->linear % 32);
  const int source = kind == Shuffle::kIndex  ? lane / width * width + (argument & (width - 1))
                     : kind == Shuffle::kXor  ? (lane ^ argument)
                     : kind == Shuffle::kDown ? lane + argument
                                              : lane - argument;
  return exchange(mask, value, source, width, line);
}

// fold(result, lane, value) over the lanes of the mask.
template <class R, class T, class Fold>
R gather(unsigned mask, T value, R result, int line, Fold fold) {
  Fiber* me = machine.current;
  me->slot = 0;
  std::memcpy(&me->slot, &value, sizeof(T));
  warp_sync(mask, line);
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    T other;
    std::memcpy(&other, &machine.fibers[me->linear / 32 * 32 + lane].slot, sizeof(T));
    result = fold(result, lane, other);
  }
  warp_sync(mask, line);
  return result;
}
inline unsigned ballot(unsigned mask, bool predicate, int line) {
  return gather(mask, predicate, 0u, line,
                [](unsigned r, unsigned lane, bool p) { return r | unsigned(p) << lane; });
}
template <class T>
unsigned match(unsigned mask, T value, int line) {
  return gather(mask, value, 0u, line, [value](unsigned r, unsigned lane, T other) {
    return r | unsigned(other == value) << lane;
  });
}
// Counts the threads of the block whose predicate holds.
inline int block_count(bool predicate, int line) {
  machine.current->slot = predicate;
  block_sync(line);
  int count = 0;
  for (const auto& f : machine.fibers) count += int(f.slot);
  block_sync(line);
  return count;
}

}  // namespace cpusim

#define threadIdx (cpusim::machine.current->thread)
#define blockIdx (cpusim::machine.block)
#define blockDim (cpusim::machine.block_dim)
#define gridDim (cpusim::machine.grid_dim)
#define __syncthreads() cpusim::block_sync(__LINE__)
#define __syncthreads_count(p) cpusim::block_count(p, __LINE__)
#define __syncthreads_or(p) (cpusim::block_count(p, __LINE__) > 0)
#define __syncthreads_and(p) (cpusim::block_count(!(p), __LINE__) == 0)
#define CPUSIM_SHUFFLE(kind, m, v, a, ...) \
  cpusim::shuffle(cpusim::Shuffle::kind, m, v, a, __LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(m, v, a, ...) CPUSIM_SHUFFLE(kIndex, m, v, a __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_xor_sync(m, v, a, ...) CPUSIM_SHUFFLE(kXor, m, v, a __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_down_sync(m, v, a, ...) CPUSIM_SHUFFLE(kDown, m, v, a __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_up_sync(m, v, a, ...) CPUSIM_SHUFFLE(kUp, m, v, a __VA_OPT__(, ) __VA_ARGS__)
#define __ballot_sync(m, p) cpusim::ballot(m, p, __LINE__)
#define __any_sync(m, p) (cpusim::ballot(m, p, __LINE__) != 0)
#define __all_sync(m, p) (cpusim::ballot(m, !(p), __LINE__) == 0)
#define __match_any_sync(m, v) cpusim::match(m, v, __LINE__)
#define __syncwarp(...) cpusim::warp_sync(0xffffffffu __VA_OPT__(&) __VA_ARGS__, __LINE__)

inline void __threadfence() {}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t{a} * b >> 32); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline double __dadd_rn(double a, double b) {
  volatile double sum = a + b;
  return sum;
}
inline double __dmul_rn(double a, double b) {
  volatile double product = a * b;
  return product;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p = old + v;
  return old;
}
template <class T>
T atomicMin(T* p, T v) {
  const T old = *p;
  *p = std::min(old, v);
  return old;
}
template <class T>
T atomicMax(T* p, T v) {
  const T old = *p;
  *p = std::max(old, v);
  return old;
}
template <class T>
T atomicOr(T* p, T v) {
  const T old = *p;
  *p = old | v;
  return old;
}
template <class T>
T atomicCAS(T* p, T compare, T v) {
  const T old = *p;
  if (old == compare) *p = v;
  return old;
}
template <class T>
T atomicExch(T* p, T v) {
  const T old = *p;
  *p = v;
  return old;
}
