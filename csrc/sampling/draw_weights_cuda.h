// Weights as sizes for the engine on a GPU: what bottom_k and curvature_multinomial share.
#pragma once

#include "common/numeric_types.h"
#include "common/warp.h"
#include "sampling/bottom_k.h"
#include "sampling/draw_cuda.h"

namespace fastif {

constexpr float kSmallestBound = 1e-30f;  // of smaller weights: normal numbers, above them
constexpr int kMaximaSteps = 64;          // elements of a thread in line_maxima

// The maximum of every line, as the bits of a double (which order as the numbers do, since none is
// negative), and the least r * n + i of an invalid weight. Thread t takes line t % width of a group
// of `width` lines, and every 256 / width-th position of a chunk.
template <class T>
__global__ void __launch_bounds__(kDrawThreads)
    line_maxima(Weights<T> weights, int width, unsigned long long* maxima,
                unsigned long long* bad) {
  const int per_step = kDrawThreads / width;
  const int l = int(threadIdx.x) % width, p = int(threadIdx.x) / width;
  const int64_t chunk = int64_t(per_step) * kMaximaSteps;
  const int64_t chunks = (weights.n + chunk - 1) / chunk;
  const int64_t groups = (weights.lines + width - 1) / width;
  for (int64_t item = blockIdx.x; item < chunks * groups; item += gridDim.x) {
    const int64_t r = item % groups * width + l, begin = item / groups * chunk;
    const int64_t end = begin + chunk < weights.n ? begin + chunk : weights.n;
    double max = 0;
    if (p < per_step && r < weights.lines) {
#pragma unroll 4
      for (int64_t i = begin + p; i < end; i += per_step) {
        const double x = to_float(weights.data[r * weights.line_stride + i * weights.step_stride]);
        const bool valid = x >= 0 && x <= std::numeric_limits<double>::max();
        if (!valid) atomicMin(bad, static_cast<unsigned long long>(r * weights.n + i));
        max = valid && x > max ? x : max;
      }
    }
    if (width == 1) {
#pragma unroll
      for (int distance = int(kWarp) / 2; distance > 0; distance /= 2) {
        const double other = __shfl_xor_sync(kWholeWarp, max, distance);
        max = other > max ? other : max;
      }
    }
    if (max > 0 && (width > 1 || threadIdx.x % kWarp == 0))
      atomicMax(&maxima[r], std::bit_cast<unsigned long long>(max));
  }
}

struct LineUnit {
  double inverse, log_unit;  // bounds are weights * inverse
};

static __global__ void __launch_bounds__(kDrawThreads)
    line_units(const unsigned long long* maxima, int64_t lines, LineUnit* units) {
  for (int64_t r = blockIdx.x * int64_t(kDrawThreads) + threadIdx.x; r < lines;
       r += gridDim.x * int64_t(kDrawThreads)) {
    const double max = std::bit_cast<double>(maxima[r]);
    // 1 / max may overflow below 1e-300: all bounds are then kSmallestBound or 0.
    const bool usual = max > 1e-300;
    units[r] = {usual ? 1 / max : 0, std::log(usual ? max : 1e-300 / double(kSmallestBound))};
  }
}

template <class T>
struct WeightSource {
  static constexpr int kBlocks = 3;
  Weights<T> weights;
  const LineUnit* units;
  bool along_positions;  // neighbours in memory

  struct Shared {};

  __device__ double log_unit(int64_t y) const { return units[y].log_unit; }

  __device__ accumulate_t<T> at(const DrawTile& tile, int r, int l) const {
    return to_float(
        weights.data[(tile.line + l) * weights.line_stride + (tile.row + r) * weights.step_stride]);
  }

  __device__ void load(const DrawPlan& plan, const DrawTile& tile, const float* limit,
                       float* bounds, Shared&, unsigned long long*, unsigned long long*) const {
    const int count = along_positions ? plan.rows * tile.lines : tile.rows * plan.lines;
#pragma unroll 4
    for (int e = threadIdx.x; e < count; e += kDrawThreads) {
      const int quotient =
          int((along_positions ? plan.by_rows : plan.by_lines).quotient(unsigned(e)));
      const int rest = e - quotient * (along_positions ? plan.rows : plan.lines);
      const int r = along_positions ? rest : quotient, l = along_positions ? quotient : rest;
      if (r >= tile.rows || l >= tile.lines) continue;
      const auto x = at(tile, r, l);
      const float scaled = float(double(x) * units[tile.line + l].inverse);
      const float bound = x > 0 ? (scaled > kSmallestBound ? scaled : kSmallestBound) : 0.0f;
      bounds[plan.slot(tile, r, l)] = limit == nullptr ? bound : bound * limit[tile.line + l];
    }
  }
  __device__ void prepare(const DrawPlan&, const DrawTile&, const uint16_t*, unsigned,
                          Shared&) const {}
  __device__ double log_size(const DrawTile& tile, int r, int l, const Shared&) const {
    return exact_log(double(at(tile, r, l)));
  }
};

// bad[0] holds kNoRow, or the r * n + i of what was found invalid before.
template <class T>
void draw_weights_cuda(const char* op, const Weights<T>& weights, const Draw& draw,
                       const DrawOutput& out, unsigned long long* bad, unsigned long long* skipped,
                       const Gpu& gpu) {
  const int64_t R = weights.lines, n = weights.n, most = 8 * int64_t(gpu.multiprocessors);
  if (R == 0) return;
  const bool along_positions =
      R == 1 || std::abs(weights.step_stride) < std::abs(weights.line_stride);
  unsigned long long* maxima = gpu.scratch<unsigned long long>(R);
  fill_bytes(op, gpu, maxima, 0, R * int64_t(sizeof(*maxima)));
  const int width = along_positions ? 1 : int(std::min<int64_t>(R, kDrawThreads));
  const int64_t chunk = int64_t(kDrawThreads / width) * kMaximaSteps;
  launch(op, gpu, line_maxima<T>, grid_size(ceil_div(n, chunk) * ceil_div(R, width), 1, most),
         kDrawThreads, 0, weights, width, maxima, bad);
  LineUnit* units = gpu.scratch<LineUnit>(R);
  launch(op, gpu, line_units, grid_size(R, kDrawThreads, most), kDrawThreads, 0, maxima, R, units);
  // Where positions are neighbours, tiles have enough of them for whole sectors of memory.
  const bool square = along_positions && R > 64;
  const int lines = int(std::min<int64_t>(R, square ? 128 : kDrawTile));
  const int rows = kDrawTile / lines;
  draw_sample_cuda(op, gpu, WeightSource<T>{weights, units, along_positions}, draw,
                   DrawPlan(draw, n, rows, lines), DrawPlan(draw, n, std::min(rows, 4), lines), out,
                   bad, skipped);
}

}  // namespace fastif
