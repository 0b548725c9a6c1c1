// Scores of kmeans_assign by plain multiply-adds in x's precision (float for halves): for few
// columns, for float64, and for the rows that the tensor cores leave open. Only *_cuda.cu files
// include this.
#pragma once

#include <algorithm>

#include "kmeans/assign_centroids_cuda.h"
#include "kmeans/assign_top_cuda.h"

namespace fastif {
namespace {

// Rows to work on: rows[0..*count), or all of them where rows is null. The list is filled by
// atomics: its order differs from run to run, what is computed for a row does not.
struct RowList {
  int64_t* rows;
  unsigned long long* count;

  __device__ __forceinline__ int64_t size(int64_t all) const {
    return rows == nullptr ? all : int64_t(*count);
  }
  __device__ __forceinline__ int64_t at(int64_t i) const { return rows == nullptr ? i : rows[i]; }
  __device__ __forceinline__ void append(int64_t row) { rows[atomicAdd(count, 1ull)] = row; }
};

template <class A>
using SimtBoard = Board<A, 2 * Simt<A>::kVector, Simt<A>::kThreads>;
template <class A>
constexpr size_t simt_shared() {
  return 2 * Simt<A>::kDepth * (Simt<A>::kStride + Simt<A>::kTile) * sizeof(A) +
         SimtBoard<A>::kBytes;
}

// Each block takes tiles of rows, against the centroid tiles of its share, blockIdx.y of gridDim.y;
// found[share * rows + i] gets the best of the i-th row listed. A thread has 2 kVector rows and as
// many centroids of a tile, kVector neighbours at a time.
template <class T>
__global__ void __launch_bounds__(Simt<float>::kThreads, 2)
    score_simt(const T* x, int64_t rows, RowList list, Centroids<accumulate_t<T>> centroids,
               int64_t tiles_per_share, TopThree<accumulate_t<T>>* found) {
  using A = accumulate_t<T>;
  constexpr int V = Simt<A>::kVector, kTile = Simt<A>::kTile, kDepth = Simt<A>::kDepth;
  constexpr int kStride = Simt<A>::kStride, kRowSlab = kDepth * kStride, kTileSlab = kDepth * kTile;
  struct alignas(16) Vector {
    A value[V];
  };
  using Best = SimtBoard<A>;
  FASTIF_DYNAMIC_SHARED(A, row_values);                // two buffers of [kDepth][kStride]
  A* const column_values = row_values + 2 * kRowSlab;  // and two of [kDepth][kTile]
  Best best(reinterpret_cast<unsigned char*>(column_values + 2 * kTileSlab));

  const int thread = int(threadIdx.x), ty = thread / 16, tx = thread % 16;
  const int load_row = thread / (kDepth / V), load_column = thread % (kDepth / V) * V;
  const int64_t tiles = (centroids.clusters + kTile - 1) / kTile;
  const int64_t first_tile = int64_t{blockIdx.y} * tiles_per_share;
  const int64_t share = tiles - first_tile < tiles_per_share ? tiles - first_tile : tiles_per_share;
  const int64_t slabs = centroids.depth() / kDepth, steps = share * slabs;
  const A* packed = centroids.columns + first_tile * slabs * kTileSlab + thread * V;
  const int64_t listed = list.size(rows);

  for (int64_t tile = blockIdx.x; tile * kTile < listed; tile += gridDim.x) {
    const bool has_row = tile * kTile + load_row < listed;
    const T* source = has_row ? x + list.at(tile * kTile + load_row) * centroids.dim : x;
    const auto load = [&](int64_t slab) {
      Vector v;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int64_t k = slab * kDepth + load_column + i;
        v.value[i] =
            has_row && k < centroids.dim ? A(to_float(source[k])) - centroids.mean[k] : A(0);
      }
      return v;
    };
    const auto store = [&](int buffer, const Vector& row, const Vector& column) {
#pragma unroll
      for (int i = 0; i < V; ++i)
        row_values[buffer * kRowSlab + (load_column + i) * kStride + load_row] = row.value[i];
      reinterpret_cast<Vector*>(column_values + buffer * kTileSlab)[thread] = column;
    };

    best.reset();
    store(0, load(0), *reinterpret_cast<const Vector*>(packed));
    A acc[2 * V][2 * V] = {};
    int64_t slab = 0, centroid_tile = first_tile;
    for (int64_t step = 0; step < steps; ++step) {
      __syncthreads();
      const int buffer = int(step % 2);
      const A *row_slab = row_values + buffer * kRowSlab,
              *tile_slab = column_values + buffer * kTileSlab;
      const bool last = slab == slabs - 1, more = step + 1 < steps;
      Vector next_row, next_column;
      if (more) {
        next_row = load(last ? 0 : slab + 1);
        next_column = *reinterpret_cast<const Vector*>(packed + (step + 1) * kTileSlab);
      }
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        const Vector* a = reinterpret_cast<const Vector*>(row_slab + k * kStride) + ty;
        const Vector* b = reinterpret_cast<const Vector*>(tile_slab + k * kTile) + tx;
        const Vector rows_of[2] = {a[0], a[16]}, columns_of[2] = {b[0], b[16]};
#pragma unroll
        for (int i = 0; i < 2 * V; ++i)
#pragma unroll
          for (int j = 0; j < 2 * V; ++j)
            acc[i][j] += rows_of[i / V].value[i % V] * columns_of[j / V].value[j % V];
      }
      if (last) {
        const int64_t first = centroid_tile * kTile + tx * V;
        Vector seeds[2] = {*reinterpret_cast<const Vector*>(centroids.seeds + first),
                           *reinterpret_cast<const Vector*>(centroids.seeds + first + 16 * V)};
#pragma unroll
        for (int i = 0; i < 2 * V; ++i) {
#pragma unroll
          for (int j = 0; j < 2 * V; ++j) acc[i][j] += seeds[j / V].value[j % V];
          best.template offer<2 * V>(
              i, [&](int j) { return acc[i][j]; },
              [&](int j) { return int(first) + j / V * (16 * V) + j % V; });
#pragma unroll
          for (int j = 0; j < 2 * V; ++j) acc[i][j] = 0;
        }
        slab = 0;
        ++centroid_tile;
      } else {
        ++slab;
      }
      if (more) store(1 - buffer, next_row, next_column);
    }
    __syncthreads();
    if (thread < kTile && tile * kTile + thread < listed) {
      TopThree<A> top = TopThree<A>::none();
      for (int other = 0; other < 16; ++other)
        top.add(best.get(thread / (16 * V) * V + thread % V, thread % (16 * V) / V * 16 + other));
      found[int64_t{blockIdx.y} * rows + tile * kTile + thread] = top;
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace fastif
