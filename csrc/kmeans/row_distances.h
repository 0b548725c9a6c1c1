// Squared distances of four rows at a time: their sums over lanes are found together.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace fastif {

// The sums over lanes of four vectors: halved down to four lanes, then transposed and added.
template <class A, class V>
FASTIF_INLINE void sum_lanes_of_four(const V* v, A* out) {
  constexpr int kLanes = int(sizeof(V) / sizeof(A));
  if constexpr (kLanes < 4) {
    for (int i = 0; i < 4; ++i) out[i] = v[i][0] + v[i][1];
  } else {
    using Q = typename VectorOf<A, 4 * sizeof(A)>::type;
    A lanes[kLanes];
    Q q[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      std::memcpy(lanes, &v[i], sizeof(V));
      q[i] = load_as<Q>(lanes);
#pragma GCC unroll 4
      for (int part = 4; part < kLanes; part += 4) q[i] += load_as<Q>(lanes + part);
    }
    const Q a = __builtin_shufflevector(q[0], q[1], 0, 4, 1, 5) +
                __builtin_shufflevector(q[0], q[1], 2, 6, 3, 7);
    const Q b = __builtin_shufflevector(q[2], q[3], 0, 4, 1, 5) +
                __builtin_shufflevector(q[2], q[3], 2, 6, 3, 7);
    const Q sum =
        __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
    std::memcpy(out, &sum, sizeof(Q));
  }
}

// out[i] = sum((x[i] - c[i])^2).
template <int kBytes, class A>
FASTIF_INLINE void paired_distances(const A* const (&x)[4], const A* const (&c)[4], int64_t dim,
                                    A* out) {
  using V = typename VectorOf<A, kBytes>::type;
  constexpr int kLanes = kBytes / int(sizeof(A));
  V sum[4] = {};
  int64_t k = 0;
  for (; k + kLanes <= dim; k += kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const V delta = load_as<V>(x[i] + k) - load_as<V>(c[i] + k);
      sum[i] += delta * delta;
    }
  }
  sum_lanes_of_four(sum, out);
  for (; k < dim; ++k)
    for (int i = 0; i < 4; ++i) out[i] += (x[i][k] - c[i][k]) * (x[i][k] - c[i][k]);
}

}  // namespace fastif
