// Packing rows for kmeans_assign: centred, and transposed so that lanes are rows.
//
// Panels of kPanel rows, [panel][kRun][kPanel]: a column of a panel is one cache line.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "common/simd.h"

namespace fastif::assign {

// Values of one panel's column.
template <class A>
inline constexpr int kPanel = 64 / int(sizeof(A));

// Columns of a panel. Products are summed in runs of this many columns, whose sums are then added:
// this bounds the rounding error, and the panels of a block stay in L1.
inline constexpr int64_t kRun = 128;

// Rows that are packed at a time: with kRun columns 24 KB. A multiple of every level's tile rows.
template <class A>
inline constexpr int64_t kBlockRows = 192 / int64_t(sizeof(A));

// Four lanes.
template <class A>
using Quad = typename VectorOf<A, 4 * sizeof(A)>::type;

// The low half of a vector W of As.
template <class W, class A>
using HalfOf = typename VectorOf<A, int(sizeof(W)) / 2>::type;

template <class W, class H, size_t... i>
FASTIF_INLINE W join(H low, H high, std::index_sequence<i...>) {
  return __builtin_shufflevector(low, high, int(i)...);
}

// The quads at x, x + stride, x + 2 stride... as one vector.
template <class W, class A>
FASTIF_INLINE W load_quads(const A* x, int64_t stride) {
  if constexpr (sizeof(W) == sizeof(Quad<A>)) {
    return load_as<W>(x);
  } else {
    using H = HalfOf<W, A>;
    constexpr int64_t kHalf = sizeof(H) / sizeof(Quad<A>);
    return join<W, H>(load_quads<H>(x, stride), load_quads<H>(x + kHalf * stride, stride),
                      std::make_index_sequence<sizeof(W) / sizeof(A)>{});
  }
}

// Lanes p of every pair of quads: 0 to 3 are the first's, 4 to 7 the second's.
template <int... p, class W, size_t... i>
FASTIF_INLINE W shuffle_quads(W a, W b, std::index_sequence<i...>) {
  constexpr int kLane[4] = {p...}, kLanes = int(sizeof...(i));
  return __builtin_shufflevector(
      a, b, (int(i) / 4 * 4 + kLane[i % 4] % 4 + kLane[i % 4] / 4 * kLanes)...);
}

// Rows x, x + dim ..., as many as W has lanes: `columns` of each, centred and transposed, to
// out[column][kPanel]. Adds their squares to norms.
template <class W, class A>
FASTIF_INLINE void pack_full_rows(const A* x, int64_t dim, int64_t columns, const A* mean, A* out,
                                  A* norms) {
  constexpr int kRows = sizeof(W) / sizeof(A), P = kPanel<A>;
  constexpr auto kLanes = std::make_index_sequence<kRows>{};
  W norm = load_as<W>(norms);
  int64_t k = 0;
  for (; k + 4 <= columns; k += 4) {
    const W m = load_quads<W>(mean + k, 0);
    W row[4];  // lane 4 q + i of row[r]: column k + i of row 4 q + r
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) row[r] = load_quads<W>(x + r * dim + k, 4 * dim) - m;
    const W low01 = shuffle_quads<0, 4, 1, 5>(row[0], row[1], kLanes);
    const W high01 = shuffle_quads<2, 6, 3, 7>(row[0], row[1], kLanes);
    const W low23 = shuffle_quads<0, 4, 1, 5>(row[2], row[3], kLanes);
    const W high23 = shuffle_quads<2, 6, 3, 7>(row[2], row[3], kLanes);
    const W column[4] = {shuffle_quads<0, 1, 4, 5>(low01, low23, kLanes),
                         shuffle_quads<2, 3, 6, 7>(low01, low23, kLanes),
                         shuffle_quads<0, 1, 4, 5>(high01, high23, kLanes),
                         shuffle_quads<2, 3, 6, 7>(high01, high23, kLanes)};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) std::memcpy(out + (k + j) * P, &column[j], sizeof(W));
    norm += (column[0] * column[0] + column[1] * column[1]) +
            (column[2] * column[2] + column[3] * column[3]);
  }
  std::memcpy(norms, &norm, sizeof(W));
  for (; k < columns; ++k) {
    for (int i = 0; i < kRows; ++i) {
      const A value = x[i * dim + k] - mean[k];
      out[k * P + i] = value;
      norms[i] += value * value;
    }
  }
}

// Packs `columns` columns of `rows` rows, minus the mean; rows up to `padded` become zero. Adds the
// squares of packed row i to norms[i]. kBytes: of a vector register.
template <int kBytes, class A>
FASTIF_INLINE void pack_rows(const A* x, int64_t rows, int64_t padded, int64_t dim, int64_t columns,
                             const A* mean, A* panels, A* norms) {
  using W = typename VectorOf<A, std::max(kBytes, int(sizeof(Quad<A>)))>::type;
  constexpr int kRows = sizeof(W) / sizeof(A), P = kPanel<A>;
  for (int64_t r = 0; r < padded; r += kRows) {
    A* out = panels + r / P * P * kRun + r % P;
    if (r + kRows <= rows) {
      pack_full_rows<W>(x + r * dim, dim, columns, mean, out, norms + r);
      continue;
    }
    for (int64_t k = 0; k < columns; ++k) {
      for (int64_t i = r; i < r + kRows; ++i) {
        const A value = i < rows ? x[i * dim + k] - mean[k] : A(0);
        out[k * P + (i - r)] = value;
        norms[i] += value * value;
      }
    }
  }
}

}  // namespace fastif::assign
