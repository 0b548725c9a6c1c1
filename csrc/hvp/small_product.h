// Products of matrices with few rows or columns, where a BLAS spends its time packing.
//
// One tile serves both products of linear_softmax_hvp: it broadcasts values of one factor against
// vectors of a row of the other.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/parallel.h"
#include "common/simd_levels.h"

namespace fastif::small {

// c[m][j] (+)= sum over k of a(m, k) b[k][j], where a(m, k) lies at a[m * kRowStride + k * a_step]:
// with the distance of a's rows a constant, a tile needs one pointer for all of them.
template <class A>
struct Product {
  int64_t rows, columns, depth;  // columns: a multiple of every level's vector
  const A* a;
  int64_t a_step;
  const A* b;
  int64_t b_row;
  A* c;
  int64_t c_row;
  bool add;  // to what c holds
  // Memory that is read next, ahead_bytes for each a(m, k), or null: fetched on the way.
  const char* ahead = nullptr;
  int64_t ahead_bytes = 0;
};

template <class L, int kRowStride, int kRows, int kVectors, class A>
FASTIF_INLINE void multiply_tile(const Product<A>& p, int64_t row, int64_t column) {
  using V = lanes_t<L, A>;
  constexpr int kLanes = L::width / int(sizeof(A));
  const A *a = p.a + row * kRowStride, *b = p.b + column;
  const bool fetch = p.ahead != nullptr && column == 0;
  const char* ahead =
      fetch ? p.ahead + row * p.depth * p.ahead_bytes : reinterpret_cast<const char*>(a);
  const int64_t ahead_step = fetch ? kRows * p.ahead_bytes : 0;
  V sum[kRows][kVectors]{};
  for (int64_t k = 0; k < p.depth; ++k, a += p.a_step, b += p.b_row, ahead += ahead_step) {
    __builtin_prefetch(ahead, 0, 2);
    V line[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) line[v] = load_lanes<L>(b + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const A value = a[m * kRowStride];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[m][v] += value * line[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    A* c = p.c + (row + m) * p.c_row + column;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      if (p.add) sum[m][v] += load_lanes<L>(c + v * kLanes);
      store_vector(c + v * kLanes, sum[m][v]);
    }
  }
}

template <class L, int kRowStride, int kVectors, int kRows, class A>
FASTIF_INLINE void multiply_rows(int64_t count, const Product<A>& p, int64_t row, int64_t column) {
  if (count == kRows) {
    multiply_tile<L, kRowStride, kRows, kVectors>(p, row, column);
  } else if constexpr (kRows > 1) {
    multiply_rows<L, kRowStride, kVectors, kRows - 1>(count, p, row, column);
  }
}

template <class L, int kRowStride, class A>
FASTIF_INLINE void multiply_body(std::integral_constant<int, kRowStride>, Product<A> p) {
  constexpr int kLanes = L::width / int(sizeof(A));
  constexpr int kMost = L::width == 64 ? 12 : 6;  // twice as many sums, of 32 or 16 registers
  const int64_t tiles = ceil_div(p.rows, kMost);
  for (int64_t column = 0; column < p.columns; column += 2 * kLanes) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = p.rows * tile / tiles, end = p.rows * (tile + 1) / tiles;
      if (p.columns - column >= 2 * kLanes) {
        multiply_rows<L, kRowStride, 2, kMost>(end - row, p, row, column);
      } else {
        multiply_rows<L, kRowStride, 1, kMost>(end - row, p, row, column);
      }
    }
  }
}
FASTIF_LEVELS(multiply_level, multiply_body)

template <int kRowStride, class A>
void multiply(const Product<A>& product) {
  multiply_level(std::integral_constant<int, kRowStride>{}, product);
}

}  // namespace fastif::small
