// Scores of kmeans_assign on the tensor cores (sm_80: mma.sync fed by cp.async), for float32 as
// TF32 and for half types. Only *_cuda.cu files include this.
#pragma once

#include "common/copy_async.h"
#include "kmeans/assign_centroids_cuda.h"
#include "kmeans/assign_top_cuda.h"

namespace fastif {
namespace {

// A block: Mma::kRows rows against the centroid tiles of its share. Eight warps, 4 x 2, hold 64 x
// 64 scores each. Slabs of both operands come in through a ring of `stages` buffers, raw x among
// them: m is subtracted and the result rounded as a warp reads its fragments, one or two
// instructions a word, hidden behind the tensor cores.
//
// A row's slab is 16 words, 64 bytes, without padding: lane t of a quad reads words 4t..4t+3 of its
// row at once, eight rows are 512 bytes in a row, so that no two lanes meet in a bank. Which word
// goes to which place of an mma does not matter as long as both operands agree: words 4t, 4t + 1
// and 4t + 2, 4t + 3 make one mma each.
struct MmaShared {
  static constexpr int kRowWords = Mma::kRows * Mma::kSlab, kTileWords = Mma::kTile * Mma::kSlab;
  static constexpr int kStageWords = kRowWords + kTileWords;
  using Best = Board<float, 8, Mma::kThreads>;
  static constexpr size_t bytes(int stages) {
    return size_t(stages) * kStageWords * sizeof(Word) + Best::kBytes;
  }
};

// The block's rows of x in global memory. `unit`: 16, 4 or 2, the bytes to which their starts are
// aligned.
template <class T>
struct RowSource {
  const T* x;
  int64_t dim, first, rows;
  int unit;

  // Copies this thread's share of slab `slab` to `stage`.
  __device__ __forceinline__ void copy(Word* stage, int64_t slab) const {
    const int quarter = int(threadIdx.x) % 4;
    const int64_t row_bytes = dim * int64_t(sizeof(T)), offset = slab * 64 + quarter * 16;
#pragma unroll
    for (int i = 0; i < Mma::kRows / 64; ++i) {
      const int row = int(threadIdx.x) / 4 + 64 * i;
      const bool inside = first + row < rows && offset < row_bytes;
      const int64_t rest = inside ? row_bytes - offset : 0;
      const int valid = int(rest < 16 ? rest : 16);
      const char* from = reinterpret_cast<const char*>(x);
      if (inside) from += (first + row) * row_bytes + offset;
      Word* to = stage + row * Mma::kSlab + quarter * 4;
      if (unit == 16) {
        copy_async<16>(to, from, valid);
      } else if (unit == 4) {
        for (int w = 0; w < 4; ++w) {
          const int bytes = valid - 4 * w < 0 ? 0 : (valid - 4 * w > 4 ? 4 : valid - 4 * w);
          copy_async<4>(to + w, bytes > 0 ? from + 4 * w : from, bytes);
        }
      } else if constexpr (sizeof(T) == 2) {  // halves at odd places, which cp.async cannot copy
        const T* values = reinterpret_cast<const T*>(from);
        for (int w = 0; w < 4; ++w) {
          const Word low = 4 * w < valid ? values[2 * w].bits : 0;
          const Word high = 4 * w + 2 < valid ? values[2 * w + 1].bits : 0;
          to[w] = low | high << 16;
        }
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(Mma::kThreads, 1)
    score_tensor(const T* x, int64_t rows, int unit, Centroids<float> centroids,
                 int64_t tiles_per_share, int stages, TopThree<float>* found) {
  using S = MmaShared;
  FASTIF_DYNAMIC_SHARED(Word, shared);
  S::Best best(reinterpret_cast<unsigned char*>(shared + stages * S::kStageWords));
  const int thread = int(threadIdx.x), lane = thread % int(kWarp), warp = thread / int(kWarp);
  const int g = lane / 4, t = lane % 4, warp_row = warp / 2, warp_column = warp % 2;

  const int64_t first_row = int64_t{blockIdx.x} * Mma::kRows;
  const RowSource<T> source{x, centroids.dim, first_row, rows, unit};
  const int64_t tiles = (centroids.clusters + Mma::kTile - 1) / Mma::kTile;
  const int64_t first_tile = int64_t{blockIdx.y} * tiles_per_share;
  const int64_t share = tiles - first_tile < tiles_per_share ? tiles - first_tile : tiles_per_share;
  const int64_t slabs = centroids.slabs(Operand<T>::kPerWord), steps = share * slabs;
  const Word* packed = centroids.words + first_tile * slabs * S::kTileWords;

  int64_t load_step = 0, load_slab = 0;
  int load_stage = 0;
  const auto load_next = [&] {
    if (load_step < steps) {
      Word* stage = shared + load_stage * S::kStageWords;
      source.copy(stage, load_slab);
      const Word* from = packed + load_step * S::kTileWords;
#pragma unroll
      for (int w = 4 * thread; w < S::kTileWords; w += 4 * Mma::kThreads)
        copy_async<16>(stage + S::kRowWords + w, from + w, 16);
      ++load_step;
      if (++load_slab == slabs) load_slab = 0;
      if (++load_stage == stages) load_stage = 0;
    }
    close_copies();  // an empty group past the end keeps the count
  };

  best.reset();
  for (int i = 0; i < stages - 1; ++i) load_next();
  float acc[4][8][4] = {};
  int64_t slab = 0, tile = first_tile;
  int stage_index = 0;
  for (int64_t step = 0; step < steps; ++step) {
    const uint4 mean = reinterpret_cast<const uint4*>(centroids.mean_words)[slab * 4 + t];
    stages == 2 ? wait_copies<0>() : wait_copies<2>();
    __syncthreads();
    load_next();  // into the buffer that all have left, having passed the barrier
    const Word* stage = shared + stage_index * S::kStageWords;
    if (++stage_index == stages) stage_index = 0;

    const uint4* a_words = reinterpret_cast<const uint4*>(stage) + (warp_row * 64 + g) * 4 + t;
    const uint4* b_words =
        reinterpret_cast<const uint4*>(stage + S::kRowWords) + (warp_column * 64 + g) * 4 + t;
    uint4 a[4][2];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 raw = a_words[(m * 16 + half * 8) * 4];
        a[m][half] = {Operand<T>::centre(raw.x, mean.x), Operand<T>::centre(raw.y, mean.y),
                      Operand<T>::centre(raw.z, mean.z), Operand<T>::centre(raw.w, mean.w)};
      }
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const uint4 b = b_words[n * 8 * 4];
#pragma unroll
      for (int m = 0; m < 4; ++m)
        multiply_add<T>(acc[m][n], a[m][0].x, a[m][1].x, a[m][0].y, a[m][1].y, b.x, b.y);
#pragma unroll
      for (int m = 0; m < 4; ++m)
        multiply_add<T>(acc[m][n], a[m][0].z, a[m][1].z, a[m][0].w, a[m][1].w, b.z, b.w);
    }
    if (++slab < slabs) continue;

    const int first = int(tile) * Mma::kTile + warp_column * 64 + 2 * t;
    float2 seeds[8];
#pragma unroll
    for (int n = 0; n < 8; ++n)
      seeds[n] = *reinterpret_cast<const float2*>(centroids.seeds + first + n * 8);
#pragma unroll
    for (int row = 0; row < 8; ++row) {
      const int m = row / 2, half = row % 2 * 2;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        acc[m][n][half] += seeds[n].x;
        acc[m][n][half + 1] += seeds[n].y;
      }
      best.template offer<16>(
          row, [&](int i) { return acc[m][i / 2][half + i % 2]; },
          [&](int i) { return first + i / 2 * 8 + i % 2; });
#pragma unroll
      for (int n = 0; n < 8; ++n) acc[m][n][half] = acc[m][n][half + 1] = 0;
    }
    slab = 0;
    ++tile;
  }
  __syncthreads();
  if (first_row + thread >= rows) return;
  // Row `thread` lies in warps 2 (thread / 64) and the next, in the lanes of one quad.
  TopThree<float> top = TopThree<float>::none();
  const int slot = thread % 64 / 8, holder = thread / 64 * 2 * int(kWarp) + thread % 8 * 4;
  for (int other = 0; other < 8; ++other)
    top.add(best.get(slot, holder + other / 4 * int(kWarp) + other % 4));
  found[int64_t{blockIdx.y} * rows + first_row + thread] = top;
}

}  // namespace
}  // namespace fastif
