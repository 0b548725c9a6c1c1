// The scores of kmeans_assign for one instruction set.
//
// A row's score for centroid c is x.c - |c|^2/2 (both centred): the largest wins. Lanes are rows,
// so the running best needs no exchange between lanes, and any number of centroids fills the tile.
// Centroids lie packed in groups of kGroup, [group][d][kGroup], each value broadcast to kVectors
// vectors of rows.
//
// A block of rows is packed one run of columns at a time (assign_pack.h), and a run of it, 24 KB,
// meets every group before the next: it stays in L1, where rows packed whole would come from L2 for
// each group. Sums of a run that is not the last wait in `totals`, for up to kSpan centroids.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/simd.h"
#include "kmeans/assign_pack.h"

namespace fastif::assign {

// Of these many centroids `totals` takes 90 KB: with the packed centroids it stays in L2. For more,
// the rows are packed again. A multiple of every level's kGroup.
inline constexpr int64_t kSpan = 480;

template <class A_, int kBytes_, int kVectors_, int kGroup_>
struct Level {
  using A = A_;
  using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  using V = typename VectorOf<A, kBytes_>::type;
  using VI = typename VectorOf<Index, kBytes_>::type;
  static constexpr int kBytes = kBytes_;
  static constexpr int kLanes = kBytes / int(sizeof(A));
  static constexpr int kVectors = kVectors_;
  static constexpr int kGroup = kGroup_;
  static constexpr int kRows = kVectors * kLanes;  // rows of a tile
  static_assert(kBlockRows<A> % kRows == 0 && kSpan % kGroup == 0);
};

// What scoring leaves for each row of a block.
template <class L>
struct Scores {
  using A = typename L::A;
  alignas(64) A best[kBlockRows<A>], second[kBlockRows<A>];
  alignas(64) typename L::Index index[kBlockRows<A>];  // of the best
  alignas(64) A norms[kBlockRows<A>];                  // sums of squares of the centred rows
};

// Memory that is needed soon. Fetched in small steps all through the arithmetic, it costs little
// waiting; in one burst before each tile, k-means of 50,000 x 512 takes 9 % longer.
struct Prefetch {
  const char* next;
  const char* end;
  int64_t step = 0;  // bytes

  FASTIF_INLINE void share_among(int64_t steps) {
    step = ((end - next) / 64 / std::max<int64_t>(steps, 1) + 1) * 64;
  }
  FASTIF_INLINE void advance() {
    const char* stop = end - next < step ? end : next + step;
    for (; next < stop; next += 64) __builtin_prefetch(next);
  }
};
inline constexpr int64_t kPrefetchColumns = 16;  // of a tile, for each step

// A run of columns of one tile's rows.
template <class A>
struct Run {
  const A* rows;  // in the panels
  int64_t columns;
  bool first, last;
};

// kCount centroids, from index `centroid` on, against the L::kRows rows of a run, which are rows
// `row`... of the block.
template <class L, int kCount>
FASTIF_INLINE void score_tile(const Run<typename L::A>& run, const typename L::A* centroids,
                              const typename L::A* seeds, int64_t centroid, int64_t row,
                              typename L::A* totals, Scores<L>& scores, Prefetch& upcoming) {
  using A = typename L::A;
  using V = typename L::V;
  using VI = typename L::VI;
  constexpr int M = L::kVectors, P = kPanel<A>, B = kBlockRows<A>;
  V acc[kCount][M];
#pragma GCC unroll 16
  for (int j = 0; j < kCount; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < M; ++v) acc[j][v] = run.first ? seeds[j] - V{} : V{};

  for (int64_t begin = 0; begin < run.columns; begin += kPrefetchColumns) {
    const int64_t end = std::min(run.columns, begin + kPrefetchColumns);
    upcoming.advance();
    for (int64_t k = begin; k < end; ++k) {
      V x[M];
#pragma GCC unroll 4
      for (int v = 0; v < M; ++v)
        x[v] = load_as<V>(run.rows + (v * L::kLanes / P * kRun + k) * P + v * L::kLanes % P);
#pragma GCC unroll 16
      for (int j = 0; j < kCount; ++j) {
        const V c = centroids[k * L::kGroup + j] - V{};  // - 0 is free, + 0 would change -0
#pragma GCC unroll 4
        for (int v = 0; v < M; ++v) acc[j][v] += x[v] * c;
      }
    }
  }
  if (!run.first) {
#pragma GCC unroll 16
    for (int j = 0; j < kCount; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < M; ++v) acc[j][v] += load_as<V>(totals + j * B + v * L::kLanes);
  }
  if (!run.last) {
#pragma GCC unroll 16
    for (int j = 0; j < kCount; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < M; ++v)
        std::memcpy(totals + j * B + v * L::kLanes, &acc[j][v], sizeof(V));
    return;
  }
#pragma GCC unroll 4
  for (int v = 0; v < M; ++v) {
    const int64_t lane = row + v * L::kLanes;
    V best = load_as<V>(scores.best + lane);
    V second = load_as<V>(scores.second + lane);
    VI index = load_as<VI>(scores.index + lane);
#pragma GCC unroll 16
    for (int j = 0; j < kCount; ++j) {
      const V score = acc[j][v];
      const V loser = score > best ? best : score;
      second = loser > second ? loser : second;
      index = score > best ? VI{} + typename L::Index(centroid + j) : index;
      best = score > best ? score : best;
    }
    std::memcpy(scores.best + lane, &best, sizeof(V));
    std::memcpy(scores.second + lane, &second, sizeof(V));
    std::memcpy(scores.index + lane, &index, sizeof(VI));
  }
}

// score_tile for `count` <= kCount centroids.
template <class L, int kCount = L::kGroup>
FASTIF_INLINE void score_group(int64_t count, const Run<typename L::A>& run,
                               const typename L::A* centroids, const typename L::A* seeds,
                               int64_t centroid, int64_t row, typename L::A* totals,
                               Scores<L>& scores, Prefetch& upcoming) {
  if (count == kCount) {
    score_tile<L, kCount>(run, centroids, seeds, centroid, row, totals, scores, upcoming);
  } else if constexpr (kCount > 1) {
    score_group<L, kCount - 1>(count, run, centroids, seeds, centroid, row, totals, scores,
                               upcoming);
  }
}

// The values that score_block needs at `totals`.
template <class A>
inline int64_t totals_size(int64_t dim, int64_t clusters, int64_t group) {
  return dim <= kRun ? 0 : kBlockRows<A> * std::min(kSpan, (clusters + group - 1) / group * group);
}

// Up to kBlockRows rows against every centroid.
template <class L>
FASTIF_INLINE void score_block(const typename L::A* x, int64_t rows, int64_t dim,
                               const typename L::A* mean, const typename L::A* centroids,
                               const typename L::A* seeds, int64_t clusters, typename L::A* totals,
                               Prefetch upcoming, Scores<L>& scores) {
  using A = typename L::A;
  constexpr int P = kPanel<A>, B = kBlockRows<A>;
  alignas(64) A panels[B * kRun];
  const int64_t padded = (rows + L::kRows - 1) / L::kRows * L::kRows;
  for (int64_t i = 0; i < padded; ++i) {
    scores.best[i] = scores.second[i] = -std::numeric_limits<A>::infinity();
    scores.index[i] = 0;
  }
  upcoming.share_among(padded / L::kRows * ((clusters - 1) / L::kGroup + 1) *
                       ((dim - 1) / kPrefetchColumns + 1));
  const int64_t span = dim <= kRun ? clusters : kSpan;
  for (int64_t low = 0; low < clusters; low += span) {
    const int64_t high = std::min(clusters, low + span);
    for (int64_t i = 0; i < padded; ++i) scores.norms[i] = 0;
    int64_t begin = 0;
    do {  // once where dim is 0
      const int64_t columns = std::min(dim - begin, kRun);
      const bool first = begin == 0, last = begin + columns == dim;
      pack_rows<L::kBytes>(x + begin, rows, padded, dim, columns, mean + begin, panels,
                           scores.norms);
      for (int64_t c = low; c < high; c += L::kGroup)
        for (int64_t r = 0; r < padded; r += L::kRows)
          score_group<L>(std::min<int64_t>(high - c, L::kGroup),
                         {panels + r / P * P * kRun + r % P, columns, first, last},
                         centroids + c * dim + begin * L::kGroup, seeds + c, c, r,
                         totals + (c - low) * B + r, scores, upcoming);
      begin += columns;
    } while (begin < dim);
  }
}

}  // namespace fastif::assign
