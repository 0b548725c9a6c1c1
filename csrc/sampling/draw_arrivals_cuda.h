// The pass over all elements: which arrive early enough to be candidates of their class?
#pragma once

#include "common/philox.h"
#include "sampling/draw_state_cuda.h"

namespace fastif {

// Keeps the candidates.
struct KeepCandidates {
  const unsigned* work;  // nothing is to be done where this is 0; null: there is

  __device__ void operator()(const DrawState& state, int64_t y, uint32_t code,
                             unsigned long long row) const {
    const unsigned long long at = atomicAdd(&state.count[y], 1ull);
    if (at >= static_cast<unsigned long long>(state.capacity)) return;
    state.entry_code[y * state.capacity + int64_t(at)] = code;
    state.entry_row[y * state.capacity + int64_t(at)] = row;
  }
};

// Fills the slots around each run with bounds that nothing passes.
__device__ __forceinline__ void close_margins(const DrawPlan& plan, const DrawTile& tile,
                                              float* bounds) {
  constexpr int kBlock = int(kGateBlock);
  const int length = plan.run_length(tile);
  for (int i = threadIdx.x; i < plan.run_count(tile) * 2 * kBlock; i += kDrawThreads) {
    const int run = i / (2 * kBlock), j = i % (2 * kBlock), lead = plan.lead(tile, run);
    const int end = lead + length, slot = j < kBlock ? j : end + j - kBlock;
    const bool outside = j < kBlock ? slot < lead : slot < (end + kBlock - 1) / kBlock * kBlock;
    if (outside) bounds[run * plan.pitch + slot] = -1;
  }
}

// The slots whose element passes the gate (gate.h), in any order.
__device__ __forceinline__ void gate_slots(const DrawPlan& plan, const DrawTile& tile,
                                           uint64_t seed, const float* bounds, uint16_t* hits,
                                           unsigned* hit_count) {
  const int per_run = plan.pitch / 4, length = plan.run_length(tile);
  // Half warps read different halves of the banks: their blocks of slots lie 64 apart.
  const int half = int(threadIdx.x) / 16 % 2;
  for (int c = threadIdx.x; c < plan.run_count(tile) * per_run; c += kDrawThreads) {
    const int run = plan.whole ? 0 : int(plan.by_counters.quotient(unsigned(c)));
    const int at = c - run * per_run, block = at / 16;
    if (block * int(kGateBlock) >= plan.lead(tile, run) + length) continue;
    const uint64_t counter =
        (plan.run_first(tile, run) / kGateBlock + uint64_t(block)) * 16 + uint64_t(at % 16);
    const PhiloxBlock philox = philox4x32({{uint32_t(counter), uint32_t(counter >> 32), 0, 0}},
                                          uint32_t(seed), uint32_t(seed >> 32));
    const int slot = run * plan.pitch + block * int(kGateBlock) + at % 16;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t word = half == 0 ? philox.word[w] : philox.word[w ^ 1];
      const int mine = slot + 16 * (w ^ half);
      if (float(word >> 1) <= bounds[mine]) hits[atomicAdd(hit_count, 1u)] = uint16_t(mine);
    }
  }
}

// Hands every candidate to the sink. `arrivals` of each element are looked at. A Source needs:
//   kBlocks                                           blocks a multiprocessor holds without spills
//   struct Shared                                     its scratch in shared memory
//   load(plan, tile, limit, bounds, shared, skipped, bad)
//       bounds[slot] >= size / exp(log_unit(y)) * limit[y] (1 for null), up to 1e-4; 0 or less
//       where the size is 0; counts what it skips, or cannot use, unless skipped is null
//   prepare(plan, tile, hits, count, shared)          with barriers, before log_size
//   log_size(tile, r, l, shared)                      exact_math.h's; -inf where the size is 0
//   log_unit(y)
template <class Source, class Sink>
__global__ void __launch_bounds__(kDrawThreads, Source::kBlocks)
    draw_arrivals(Source source, DrawPlan plan, DrawState state, uint64_t seed, int64_t arrivals,
                  Sink sink) {
  if (sink.work != nullptr && *sink.work == 0) return;
  FASTIF_DYNAMIC_SHARED(float, bounds);
  uint16_t* hits = reinterpret_cast<uint16_t*>(bounds + plan.runs * plan.pitch);
  __shared__ unsigned hit_count;
  __shared__ typename Source::Shared shared;
  const int64_t tiles = plan.row_tiles * plan.line_tiles;
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const DrawTile tile = plan.tile(index);
    if (threadIdx.x == 0) hit_count = 0;
    close_margins(plan, tile, bounds);
    source.load(plan, tile, state.limit, bounds, shared,
                sink.work == nullptr ? state.skipped : nullptr, state.bad);
    __syncthreads();
    gate_slots(plan, tile, seed, bounds, hits, &hit_count);
    __syncthreads();
    const unsigned count = hit_count;
    if (count > 0) source.prepare(plan, tile, hits, count, shared);
    for (unsigned h = threadIdx.x; h < count; h += kDrawThreads) {
      int r, l;
      plan.place(tile, hits[h], &r, &l);
      const double log_size = source.log_size(tile, r, l, shared);
      if (!(log_size > -std::numeric_limits<double>::infinity())) continue;
      const int64_t y = tile.line + l;
      const uint64_t element = tile.first + uint64_t(r) * uint64_t(plan.classes) + uint64_t(l);
      double arrival = 0;
      for (int64_t j = 0; j < arrivals; ++j) {
        arrival += exponential(uniform(seed, element, uint32_t(j)));
        const uint32_t code = key_code(float(log_size - exact_log(arrival)));
        const unsigned long long row = static_cast<unsigned long long>(tile.row + r);
        if (!state.takes(y, code, row)) break;  // later arrivals have smaller keys
        sink(state, y, code, row);
      }
    }
    __syncthreads();
  }
}

}  // namespace fastif
