// Weights as sizes for the engine on a GPU: what bottom_k and curvature_multinomial share.
#pragma once

#include "common/numeric_types.h"
#include "sampling/bottom_k.h"
#include "sampling/draw_cuda.h"

namespace fastif {

constexpr float kSmallestBound = 1e-30f;  // of smaller weights: normal numbers, above them

// Lines of which a tile takes as many at a time, where positions are next to one another in memory.
constexpr int kLineTile = 128;

// The maximum of every line, as the bits of a double (which order as the numbers do, as none is
// negative), and the least r * n + i of an invalid weight. Goes through the plan's tiles.
template <class T>
__global__ void __launch_bounds__(kDrawThreads)
    line_maxima(Weights<T> weights, DrawPlan plan, bool positions_first, unsigned long long* maxima,
                unsigned long long* bad) {
  const int64_t tiles = plan.row_tiles * plan.line_tiles;
  __shared__ unsigned long long shared[kDrawTile];
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const DrawTile tile = plan.tile(index);
    for (int l = threadIdx.x; l < tile.lines; l += kDrawThreads) shared[l] = 0;
    __syncthreads();
    for (int l0 = 0; l0 < tile.lines; l0 += kDrawThreads) {
    }
    __syncthreads();
  }
}

}  // namespace fastif
