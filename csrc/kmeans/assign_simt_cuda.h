// Scores of kmeans_assign by plain multiply-adds in x's precision (float for halves): for few
// columns, for float64, and for the rows that the tensor cores leave open. Only *_cuda.cu files
// include this.
#pragma once

#include <algorithm>

#include "common/copy_async.h"
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

// How the blocks of a kernel share the centroid tiles of a row tile: `count` shares of `tiles`
// tiles. For a list, whose length the GPU alone knows, count is 0 until `of` has settled it: as
// many as `at_once` blocks have the time for.
struct Shares {
  int count;
  int64_t tiles;  // of a share; of all shares where count is 0
  int64_t at_once;

  FASTIF_HOST_DEVICE static Shares cut(int64_t shares, int64_t all_tiles) {
    const int64_t each = (all_tiles + shares - 1) / shares;
    return {int((all_tiles + each - 1) / each), each, 0};
  }
  FASTIF_HOST_DEVICE Shares of(int64_t rows, int tile_rows) const {
    const int64_t row_tiles = (rows + tile_rows - 1) / tile_rows;
    if (count != 0 || row_tiles == 0) return *this;
    const int64_t idle = at_once / row_tiles;
    return cut(idle < 1 ? 1 : (idle < tiles ? idle : tiles), tiles);
  }
};

template <class A>
using SimtBoard = Board<A, 2 * Simt<A>::kVector, Simt<A>::kThreads>;
template <class A>
constexpr size_t simt_shared() {
  return 2 * Simt<A>::kDepth * (Simt<A>::kStride + Simt<A>::kTile) * sizeof(A) +
         SimtBoard<A>::kBytes;
}

// Each block takes tiles of the listed rows, against the centroid tiles of one share each;
// found[share * listed + i] gets the best of the i-th row. A thread has 2 kVector rows and as many
// centroids of a tile, kVector neighbours at a time.
template <class T>
__global__ void __launch_bounds__(Simt<float>::kThreads, 2)
    score_simt(const T* x, int64_t rows, RowList list, Centroids<accumulate_t<T>> centroids,
               Shares shares, TopThree<accumulate_t<T>>* found) {
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
  const int dim = int(centroids.dim), slabs = int(centroids.depth() / kDepth);
  const int tiles = int((centroids.clusters + kTile - 1) / kTile);
  const int64_t listed = list.size(rows);
  const unsigned row_tiles = unsigned((listed + kTile - 1) / kTile);
  shares = shares.of(listed, kTile);
  for (unsigned item = blockIdx.x; item < row_tiles * shares.count; item += gridDim.x) {
    const unsigned share = item / row_tiles;
    const int64_t first_row = int64_t{item % row_tiles} * kTile;
    int tile = int(share * shares.tiles), slab = 0;
    int left = (tiles - tile < shares.tiles ? tiles - tile : int(shares.tiles)) * slabs;
    const A* packed = centroids.columns + int64_t{tile} * slabs * kTileSlab + thread * V;
    const bool has_row = first_row + load_row < listed;
    const T* source = has_row ? x + list.at(first_row + load_row) * dim : x;
    const auto load = [&] {
      Vector v;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int k = slab * kDepth + load_column + i;
        v.value[i] = has_row && k < dim ? A(to_float(source[k])) - centroids.mean[k] : A(0);
      }
      return v;
    };
    const auto store = [&](int buffer, const Vector& row) {
#pragma unroll
      for (int i = 0; i < V; ++i)
        row_values[buffer * kRowSlab + (load_column + i) * kStride + load_row] = row.value[i];
    };
    const auto copy_columns = [&](int buffer) {
      copy_async<16>(column_values + buffer * kTileSlab + thread * V, packed, 16);
      close_copies();
      packed += kTileSlab;
    };

    best.reset();
    copy_columns(0);
    store(0, load());
    A acc[2 * V][2 * V] = {};
    for (int buffer = 0; left > 0; --left, buffer = 1 - buffer) {
      wait_copies<0>();
      __syncthreads();
      const A* row_slab = row_values + buffer * kRowSlab;
      const A* tile_slab = column_values + buffer * kTileSlab;
      const bool last = ++slab == slabs;
      if (last) slab = 0;
      Vector next_row;
      if (left > 1) {
        copy_columns(1 - buffer);
        next_row = load();
      }
#pragma unroll 4  // all eight cost more registers than two blocks have
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
      if (left > 1) store(1 - buffer, next_row);
      if (last) {
        const int first = tile++ * kTile + tx * V;
        const Vector* seeds = reinterpret_cast<const Vector*>(centroids.seeds + first);
        const Vector seeds_of[2] = {seeds[0], seeds[16]};
#pragma unroll
        for (int i = 0; i < 2 * V; ++i) {
#pragma unroll
          for (int j = 0; j < 2 * V; ++j) acc[i][j] += seeds_of[j / V].value[j % V];
          best.template offer<2 * V>(
              i, [&](int j) { return acc[i][j]; },
              [&](int j) { return first + j / V * (16 * V) + j % V; });
#pragma unroll
          for (int j = 0; j < 2 * V; ++j) acc[i][j] = 0;
        }
      }
    }
    __syncthreads();
    if (thread < kTile && first_row + thread < listed) {
      TopThree<A> top = TopThree<A>::none();
      for (int other = 0; other < 16; ++other)
        top.add(best.get(thread / (16 * V) * V + thread % V, thread % (16 * V) / V * 16 + other));
      found[share * listed + first_row + thread] = top;
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace fastif
