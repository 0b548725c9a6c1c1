// The arithmetic of kmeans_assign for one instruction set: packing rows, and scoring them.
//
// A row's score for centroid c is x.c - |c|^2/2 (both centred): the largest wins. Lanes are rows,
// so the running best needs no exchange between lanes, and any number of centroids fills the tile.
// Rows lie packed in panels of kPanel rows, [panel][d][kPanel]; centroids in groups of kGroup,
// [group][d][kGroup], each value broadcast to kVectors vectors of rows.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/simd.h"

namespace fastif::assign {

// Values of one panel's column: a cache line.
template <class A>
inline constexpr int kPanel = 64 / int(sizeof(A));

// Products are summed in runs of kRun, whose sums are then added: this bounds the rounding error.
inline constexpr int64_t kRun = 256;

template <class A_, int kBytes, int kVectors_, int kGroup_>
struct Level {
  using A = A_;
  using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  using V = typename VectorOf<A, kBytes>::type;
  using VI = typename VectorOf<Index, kBytes>::type;
  static constexpr int kLanes = kBytes / int(sizeof(A));
  static constexpr int kVectors = kVectors_;
  static constexpr int kGroup = kGroup_;
  static constexpr int kRows = kVectors * kLanes;  // rows of a tile
};

// What scoring leaves for each row.
template <class A>
struct Scores {
  A* best;
  A* second;
  typename Level<A, 16, 1, 1>::Index* index;  // of the best
};

// kCount centroids against the L::kRows rows at x; runs on the best two scores of each row.
template <class L, int kCount>
FASTIF_INLINE void score_tile(const typename L::A* x, int64_t dim, const typename L::A* centroids,
                              const typename L::A* seeds, int64_t first,
                              const Scores<typename L::A>& scores) {
  using A = typename L::A;
  using V = typename L::V;
  using VI = typename L::VI;
  constexpr int M = L::kVectors, P = kPanel<A>;
  V acc[kCount][M], total[kCount][M];  // total is used where dim > kRun
  if (dim > kRun) std::memset(total, 0, sizeof(total));
#pragma GCC unroll 16
  for (int j = 0; j < kCount; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < M; ++v) acc[j][v] = V{} + seeds[j];

  for (int64_t begin = 0; begin < dim; begin += kRun) {
    const int64_t end = begin + kRun < dim ? begin + kRun : dim;
    if (begin > 0) {
#pragma GCC unroll 16
      for (int j = 0; j < kCount; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < M; ++v) {
          total[j][v] += acc[j][v];
          acc[j][v] = V{};
        }
    }
    for (int64_t k = begin; k < end; ++k) {
      V row[M];
#pragma GCC unroll 4
      for (int v = 0; v < M; ++v)
        row[v] = load_as<V>(x + (v * L::kLanes / P * dim + k) * P + v * L::kLanes % P);
#pragma GCC unroll 16
      for (int j = 0; j < kCount; ++j) {
        const V c = V{} + centroids[k * L::kGroup + j];
#pragma GCC unroll 4
        for (int v = 0; v < M; ++v) acc[j][v] += row[v] * c;
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < M; ++v) {
    V best = load_as<V>(scores.best + v * L::kLanes);
    V second = load_as<V>(scores.second + v * L::kLanes);
    VI index = load_as<VI>(scores.index + v * L::kLanes);
#pragma GCC unroll 16
    for (int j = 0; j < kCount; ++j) {
      const V score = dim > kRun ? total[j][v] + acc[j][v] : acc[j][v];
      const V loser = score > best ? best : score;
      second = loser > second ? loser : second;
      index = score > best ? VI{} + typename L::Index(first + j) : index;
      best = score > best ? score : best;
    }
    std::memcpy(scores.best + v * L::kLanes, &best, sizeof(V));
    std::memcpy(scores.second + v * L::kLanes, &second, sizeof(V));
    std::memcpy(scores.index + v * L::kLanes, &index, sizeof(VI));
  }
}

template <class L, int kCount = L::kGroup>
FASTIF_INLINE void score_group(int64_t count, const typename L::A* x, int64_t dim,
                               const typename L::A* centroids, const typename L::A* seeds,
                               int64_t first, const Scores<typename L::A>& scores) {
  if (count == kCount) {
    score_tile<L, kCount>(x, dim, centroids, seeds, first, scores);
  } else if constexpr (kCount > 1) {
    score_group<L, kCount - 1>(count, x, dim, centroids, seeds, first, scores);
  }
}

// Memory that is needed soon: fetched piece by piece between tiles, it costs no waiting.
struct Prefetch {
  const char* next;
  const char* end;

  FASTIF_INLINE void advance(int64_t bytes) {
    const char* stop = end - next < bytes ? end : next + bytes;
    for (; next < stop; next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// Every centroid against every row of the packed panels.
template <class L>
FASTIF_INLINE void score_rows(const typename L::A* packed, int64_t rows, int64_t dim,
                              const typename L::A* centroids, const typename L::A* seeds,
                              int64_t clusters, const Scores<typename L::A>& scores,
                              Prefetch upcoming) {
  using A = typename L::A;
  constexpr int P = kPanel<A>;
  for (int64_t i = 0; i < rows; ++i) {
    scores.best[i] = scores.second[i] = -std::numeric_limits<A>::infinity();
    scores.index[i] = 0;
  }
  const int64_t tiles = (rows + L::kRows - 1) / L::kRows * ((clusters - 1) / L::kGroup + 1);
  const int64_t share = ((upcoming.end - upcoming.next) / 64 / (tiles > 0 ? tiles : 1) + 1) * 64;
  for (int64_t first = 0; first < clusters; first += L::kGroup) {
    const int64_t count = clusters - first < L::kGroup ? clusters - first : L::kGroup;
    for (int64_t r = 0; r < rows; r += L::kRows) {
      upcoming.advance(share);
      score_group<L>(count, packed + r / P * P * dim + r % P, dim, centroids + first * dim,
                     seeds + first, first, {scores.best + r, scores.second + r, scores.index + r});
    }
  }
}

// Four rows, columns [begin, end), minus the mean: transposed into a panel's column slots. Adds the
// squares to norms[0..3].
template <class A>
FASTIF_INLINE void pack_four_rows(const A* x, int64_t dim, int64_t begin, int64_t end,
                                  const A* mean, A* out, A* norms) {
  using Q = typename VectorOf<A, 4 * sizeof(A)>::type;
  constexpr int P = kPanel<A>;
  Q norm = load_as<Q>(norms);
  int64_t k = begin;
  for (; k + 4 <= end; k += 4) {
    const Q m = load_as<Q>(mean + k);
    const Q a = load_as<Q>(x + k) - m, b = load_as<Q>(x + dim + k) - m;
    const Q c = load_as<Q>(x + 2 * dim + k) - m, d = load_as<Q>(x + 3 * dim + k) - m;
    const Q ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    const Q ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Q cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const Q cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    const Q column[4] = {__builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5),
                         __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7),
                         __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5),
                         __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7)};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) std::memcpy(out + (k + j) * P, &column[j], sizeof(Q));
    norm += (column[0] * column[0] + column[1] * column[1]) +
            (column[2] * column[2] + column[3] * column[3]);
  }
  std::memcpy(norms, &norm, sizeof(Q));
  for (; k < end; ++k) {
    for (int i = 0; i < 4; ++i) {
      const A value = x[i * dim + k] - mean[k];
      out[k * P + i] = value;
      norms[i] += value * value;
    }
  }
}

// Packs `rows` rows, minus the mean, into panels; rows up to `padded` become zero.
// norms[i]: the sum of squares of packed row i.
template <class A>
FASTIF_INLINE void pack_rows(const A* x, int64_t rows, int64_t padded, int64_t dim, const A* mean,
                             A* packed, A* norms) {
  constexpr int P = kPanel<A>;
  constexpr int64_t kColumns = 64;  // a block of a panel is complete before it leaves L1
  for (int64_t i = 0; i < padded; ++i) norms[i] = 0;
  for (int64_t r0 = 0; r0 < padded; r0 += P) {
    for (int64_t begin = 0; begin < dim; begin += kColumns) {
      const int64_t end = begin + kColumns < dim ? begin + kColumns : dim;
      for (int64_t r = r0; r < r0 + P && r < padded; r += 4) {
        A* out = packed + r0 * dim + (r - r0);
        if (r + 4 <= rows) {
          pack_four_rows<A>(x + r * dim, dim, begin, end, mean, out, norms + r);
          continue;
        }
        for (int64_t k = begin; k < end; ++k) {
          for (int64_t i = r; i < r + 4; ++i) {
            const A value = i < rows ? x[i * dim + k] - mean[k] : A(0);
            out[k * P + (i - r)] = value;
            norms[i] += value * value;
          }
        }
      }
    }
  }
}

// sum((x - c)^2), in 2 vectors of partial sums.
template <class L>
FASTIF_INLINE typename L::A squared_distance(const typename L::A* x, const typename L::A* c,
                                             int64_t dim) {
  using A = typename L::A;
  using V = typename L::V;
  V sum0{}, sum1{};
  int64_t k = 0;
  for (; k + 2 * L::kLanes <= dim; k += 2 * L::kLanes) {
    const V d0 = load_as<V>(x + k) - load_as<V>(c + k);
    const V d1 = load_as<V>(x + k + L::kLanes) - load_as<V>(c + k + L::kLanes);
    sum0 += d0 * d0;
    sum1 += d1 * d1;
  }
  sum0 += sum1;
  A lanes[L::kLanes], sum = 0;
  std::memcpy(lanes, &sum0, sizeof(V));
  for (A lane : lanes) sum += lane;
  for (; k < dim; ++k) sum += (x[k] - c[k]) * (x[k] - c[k]);
  return sum;
}

}  // namespace fastif::assign
