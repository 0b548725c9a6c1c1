// Up to which candidate each class takes them in: a guess from a probe, and the exact answer.
//
// The exact answer is a radix select on (code, row), for the classes whose guess was no good: each
// pass counts the values of one digit among the elements that agree with the digits known so far,
// and stops for a class as soon as between k + 1 and `capacity` of its elements lie up to where it
// has got. It is exact for whatever sizes: rows settle ties of keys.
#pragma once

#include "sampling/draw_arrivals_cuda.h"

namespace fastif {

constexpr int kDigits = 256, kCodePasses = 4;

struct ClassSelect {
  unsigned long long taken;  // elements before those that agree with the digits known
  unsigned long long row_prefix;
  uint32_t prefix;
  uint32_t most_code;  // an upper bound of the codes that count
  bool open, selected;
};

struct DrawSelect {
  ClassSelect* classes;           // [Y]
  unsigned long long* histogram;  // [Y, kDigits]
  unsigned* unsettled;            // [passes + 1] classes that still need pass i
  unsigned* open;                 // classes whose guess was no good
  float* keep_limit;              // [Y] the gate's limit for the classes that are settled
  int row_passes;

  FASTIF_HOST_DEVICE int passes() const { return kCodePasses + row_passes; }
  __device__ int shift(int pass) const {
    return 8 * ((pass < kCodePasses ? kCodePasses : passes()) - 1 - pass);
  }
};

// Counts the digits of a pass.
struct CountDigits {
  const unsigned* work;
  DrawSelect select;
  int pass;

  __device__ void operator()(const DrawState&, int64_t y, uint32_t code,
                             unsigned long long row) const {
    const ClassSelect& s = select.classes[y];
    const int shift = select.shift(pass);
    if (pass < kCodePasses) {
      if (pass > 0 && (code ^ s.prefix) >> (shift + 8) != 0) return;
    } else if (code != s.prefix || (row ^ s.row_prefix) >> (shift + 8) != 0) {
      return;
    }
    const uint32_t digit =
        uint32_t(pass < kCodePasses ? code >> shift : uint32_t(row >> shift)) % kDigits;
    atomicAdd(&select.histogram[y * kDigits + digit], 1ull);
  }
};

// One warp to a class: settles it, or fixes one more digit.
template <class Source>
__global__ void __launch_bounds__(kDrawThreads)
    select_digit(Source source, DrawState state, DrawSelect select, int pass) {
  if (select.unsettled[pass] == 0) return;
  constexpr int kPerLane = kDigits / int(kWarp);
  const int lane = int(threadIdx.x % kWarp);
  const int64_t warps = gridDim.x * int64_t(kDrawThreads / kWarp);
  for (int64_t y = (blockIdx.x * int64_t(kDrawThreads) + threadIdx.x) / kWarp; y < state.classes;
       y += warps) {
    ClassSelect s = select.classes[y];
    if (!s.open || s.selected) continue;
    unsigned long long* bins = select.histogram + y * kDigits + lane * kPerLane;
    unsigned long long mine = 0, upto = s.taken;
    for (int i = 0; i < kPerLane; ++i) mine += bins[i];
    for (int l = 0; l < int(kWarp); ++l) {
      const unsigned long long other = __shfl_sync(kWholeWarp, mine, l);
      if (l < lane) upto += other;
    }
    // The first digit up to which there are k + 1.
    const unsigned long long needed = static_cast<unsigned long long>(state.k) + 1;
    int digit = kDigits;
    unsigned long long below = 0, total = upto;
    for (int i = 0; i < kPerLane; ++i) {
      const unsigned long long bin = bins[i];
      bins[i] = 0;
      if (digit == kDigits && total + bin >= needed) {
        digit = lane * kPerLane + i;
        below = total;
        upto = total + bin;
      }
      total += bin;
    }
    const unsigned found = __ballot_sync(kWholeWarp, digit < kDigits);
    const int source_lane = found == 0 ? int(kWarp) - 1 : __ffs(found) - 1;
    digit = __shfl_sync(kWholeWarp, digit, source_lane);
    below = __shfl_sync(kWholeWarp, below, source_lane);
    upto = __shfl_sync(kWholeWarp, upto, source_lane);
    if (lane != 0) continue;
    const int shift = select.shift(pass);
    uint32_t code = s.most_code;
    unsigned long long row = kNoRow;
    if (found == 0) {  // fewer than k + 1 in all: every one is taken in
      s.selected = true;
    } else {
      if (pass < kCodePasses) {
        s.prefix |= uint32_t(digit) << shift;
        const uint32_t last = s.prefix | ((1u << shift) - 1);
        code = last < code ? last : code;
      } else {
        s.row_prefix |= static_cast<unsigned long long>(digit) << shift;
        code = s.prefix;
        row = s.row_prefix | ((1ull << shift) - 1);
      }
      s.selected = upto <= static_cast<unsigned long long>(state.capacity);
      s.taken = below;
    }
    state.code[y] = code;
    state.row[y] = row;
    const float limit = gate_limit(code, source.log_unit(y));
    state.limit[y] = s.selected ? -1.0f : limit;
    if (s.selected)
      select.keep_limit[y] = limit;
    else
      atomicAdd(&select.unsettled[pass + 1], 1u);
    select.classes[y] = s;
  }
}

// With replacement: the first arrivals have told up to where there are k + 1 candidates; now all
// arrivals up to there are gone through in the same way.
template <class Source>
__global__ void __launch_bounds__(kDrawThreads)
    select_again(Source source, DrawState state, DrawSelect select, unsigned* unsettled) {
  if (*select.open == 0) return;
  for (int64_t y = blockIdx.x * int64_t(kDrawThreads) + threadIdx.x; y < state.classes;
       y += gridDim.x * int64_t(kDrawThreads)) {
    if (!select.classes[y].open) continue;
    select.classes[y] = {0, 0, 0, state.code[y], true, false};
    state.row[y] = kNoRow;
    state.limit[y] = gate_limit(state.code[y], source.log_unit(y));
    atomicAdd(unsettled, 1u);
  }
}

// Sums over the tiles of a probe: of sizes, of squares of sizes, of squares of tiles' sums.
struct ProbeSums {
  double* sums;  // [blocks, 3, Y]
  int64_t blocks;
};

// blockIdx.y strides over the tiles of lines, so that one block alone adds to a sum.
template <class Source>
__global__ void __launch_bounds__(kDrawThreads, 4)
    probe_sizes(Source source, DrawPlan plan, ProbeSums out) {
  FASTIF_DYNAMIC_SHARED(float, bounds);
  __shared__ typename Source::Shared shared;
  double* sums = out.sums + blockIdx.x * 3 * plan.classes;
  for (int64_t line_tile = blockIdx.y; line_tile < plan.line_tiles; line_tile += gridDim.y) {
    for (int64_t row_tile = blockIdx.x; row_tile < plan.row_tiles; row_tile += gridDim.x) {
      const DrawTile tile = plan.tile(row_tile * plan.line_tiles + line_tile);
      source.load(plan, tile, nullptr, bounds, shared, nullptr, nullptr);
      __syncthreads();
      for (int l = threadIdx.x; l < tile.lines; l += kDrawThreads) {
        double sum = 0, square = 0;
        for (int r = 0; r < tile.rows; ++r) {
          const double size = bounds[plan.slot(tile, r, l)];
          if (!(size > 0)) continue;
          sum += size;
          square += size * size;
        }
        double* to = sums + tile.line + l;
        const bool first = row_tile == blockIdx.x;
        to[0] = (first ? 0 : to[0]) + sum;
        to[plan.classes] = (first ? 0 : to[plan.classes]) + square;
        to[2 * plan.classes] = (first ? 0 : to[2 * plan.classes]) + sum * sum;
      }
      __syncthreads();
    }
  }
}

// Starts every class. With a probe, from where about twice the candidates needed are expected; a
// class of which it says too little takes in nothing yet. Without one, every candidate is taken in.
template <class Source>
__global__ void __launch_bounds__(kDrawThreads)
    start_classes(Source source, DrawState state, ProbeSums probe, double scale, bool replacement) {
  for (int64_t y = blockIdx.x * int64_t(kDrawThreads) + threadIdx.x; y < state.classes;
       y += gridDim.x * int64_t(kDrawThreads)) {
    uint32_t code = kEveryCode;
    float limit = std::numeric_limits<float>::infinity();
    if (probe.sums != nullptr) {
      double sum = 0, square = 0, tile_square = 0;
      for (int64_t b = 0; b < probe.blocks; ++b) {
        sum += probe.sums[(3 * b) * state.classes + y];
        square += probe.sums[(3 * b + 1) * state.classes + y];
        tile_square += probe.sums[(3 * b + 2) * state.classes + y];
      }
      const double needed = double(state.k) + 1;
      // As many equal tiles, and rows of all, would have the same spread.
      const bool known = sum > 0 && (scale == 1 || sum * sum >= 24 * tile_square);
      const bool plenty = replacement || sum * sum * scale >= 8 * needed * square;
      if (known && plenty) {
        const double key = source.log_unit(y) - std::log((2 * needed + 12) / (sum * scale));
        code = key_code(float(key));
        limit = gate_limit(code, source.log_unit(y));
      } else {
        code = 0;
        limit = -1;
      }
    }
    state.code[y] = code;
    state.row[y] = kNoRow;
    state.limit[y] = limit;
    state.count[y] = 0;
  }
}

}  // namespace fastif
