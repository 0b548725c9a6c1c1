#include "kmeans/kmeans_assign.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/aligned.h"
#include "common/clones.h"
#include "kmeans/assign_tile.h"
#include "kmeans/row_block.h"
#include "kmeans/row_distances.h"

namespace fastif {
namespace {

using namespace assign;

constexpr int64_t kTaskRows = 192;  // blocks of one task share their scratch memory

// The centroids as score_block reads them, and what bounds a score's error.
template <class A>
struct Packed {
  std::vector<A> mean;       // [dim] of the finite centroids
  Scratch<A> groups;         // [ceil(clusters / group)][dim][group], centred
  std::vector<A> seeds;      // -|c|^2/2; -inf for a centroid that is not finite
  std::vector<char> finite;  // [clusters]
  double largest_norm = 0;   // max |c|, centred
};

template <class A>
Packed<A> pack_centroids(const A* centroids, int64_t clusters, int64_t dim, int64_t group,
                         const Pool& pool) {
  const int64_t groups = ceil_div(clusters, group);
  Packed<A> packed{std::vector<A>(dim), Scratch<A>(groups * group * dim),
                   std::vector<A>(groups * group, -std::numeric_limits<A>::infinity()),
                   std::vector<char>(clusters)};
  std::vector<double> mean(dim, 0.0);
  int64_t count = 0;
  for (int64_t j = 0; j < clusters; ++j) {
    const A* c = centroids + j * dim;
    packed.finite[j] = std::all_of(c, c + dim, [](A value) { return std::isfinite(value); });
    if (!packed.finite[j]) continue;
    ++count;
    for (int64_t k = 0; k < dim; ++k) mean[k] += (c[k] - mean[k]) / double(count);
  }
  for (int64_t k = 0; k < dim; ++k) packed.mean[k] = A(mean[k]);

  std::vector<double> norms(clusters, 0.0);
  parallel_tasks(pool, groups, [&](int64_t g) {
    A* out = packed.groups.get() + g * group * dim;
    std::fill(out, out + group * dim, A(0));
    for (int64_t j = g * group; j < std::min(clusters, (g + 1) * group); ++j) {
      if (!packed.finite[j]) continue;
      for (int64_t k = 0; k < dim; ++k) {
        const A value = centroids[j * dim + k] - packed.mean[k];
        out[k * group + j % group] = value;
        norms[j] += double(value) * double(value);
      }
      packed.seeds[j] = A(-0.5 * norms[j]);
    }
  });
  for (double norm : norms) packed.largest_norm = std::max(packed.largest_norm, std::sqrt(norm));
  return packed;
}

// Bounds on the rounding error of a row's score: slope * |row| + offset, for the centred row.
struct ErrorBound {
  double slope, offset;
};

// Every value of x and c is centred with relative error u, each product enters through at most
// min(d, kRun) + d/kRun + 1 further roundings, the seed likewise after three of its own; products
// that underflow lose up to the smallest normal number each. By Cauchy-Schwarz the error is at most
// g (|x||c| + |c|^2/2). 1 % on top covers the terms of order u^2 and float64's own rounding.
template <class A>
ErrorBound error_bound(int64_t dim, double largest_norm) {
  const double u = std::numeric_limits<A>::epsilon() / 2.0;
  const double g = 1.01 * u * double(std::min(dim, kRun) + dim / kRun + 8);
  return {g * largest_norm, 0.5 * g * largest_norm * largest_norm +
                                double(dim + 1) * double(std::numeric_limits<A>::min())};
}

// The squared distance in float64, or, once it is seen to be above `limit`, some value above it.
template <class A>
FASTIF_CLONES double distance_up_to(const A* x, const A* c, int64_t dim, double limit) {
  double total = 0;
  for (int64_t begin = 0; begin < dim && !(total > limit); begin += 64) {
    const int64_t end = std::min(dim, begin + 64);
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = begin; k < end; ++k) {
      const double delta = double(x[k]) - double(c[k]);
      sum += delta * delta;
    }
    total += sum;
  }
  return total;
}

// The nearest finite centroid in float64, the lowest index among equals; -1 if there is none.
template <class A>
int64_t settle(const A* x, const A* centroids, int64_t dim, int64_t clusters, const char* finite,
               int64_t guess) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  // Starting from a near centroid lets the sums for most others stop early.
  const double limit = finite[guess] ? distance_up_to(x, centroids + guess * dim, dim, kInf) : kInf;
  double least = limit;
  int64_t label = -1;
  for (int64_t j = 0; j < clusters; ++j) {
    if (!finite[j]) continue;
    const double distance = distance_up_to(x, centroids + j * dim, dim, least);
    if (distance < least || (label < 0 && distance == least)) {
      least = distance;
      label = j;
    }
  }
  return label;
}

template <class A>
struct Rows {
  const A* x;
  int64_t count, dim, clusters;
  const A* centroids;
  const Packed<A>* packed;
  ErrorBound bound;
  Prefetch upcoming;  // the rows of the next block
  int64_t* labels;
  A* sqdist;
};

// The labels and distances of a block of rows.
template <class L>
FASTIF_INLINE void assign_rows(const Rows<typename L::A>& rows, typename L::A* totals) {
  using A = typename L::A;
  const Packed<A>& packed = *rows.packed;
  const int64_t dim = rows.dim;
  Scores<L> scores;
  score_block<L>(rows.x, rows.count, dim, packed.mean.data(), packed.groups.get(),
                 packed.seeds.data(), rows.clusters, totals, rows.upcoming, scores);
  for (int64_t i = 0; i < rows.count; ++i) {
    const A* x = rows.x + i * dim;
    int64_t label = scores.index[i];
    // A norm carries a relative error of its own, at most dim * epsilon / 2.
    const double norm =
        std::sqrt(double(scores.norms[i])) * (1 + double(dim) * std::numeric_limits<A>::epsilon());
    const double error = rows.bound.slope * norm + rows.bound.offset;
    const double margin = double(scores.best[i]) - double(scores.second[i]);
    if (!(margin > 2 * error)) {  // also where anything is NaN or inf
      const bool finite = std::all_of(x, x + dim, [](A value) { return std::isfinite(value); });
      label =
          finite ? settle(x, rows.centroids, dim, rows.clusters, packed.finite.data(), label) : -1;
    }
    rows.labels[i] = label;
  }
  for (int64_t i = 0; i < rows.count; i += 4) {
    const A *x[4], *c[4];
    A found[4];
    for (int64_t r = 0; r < 4; ++r) {  // the last row again where there are no four
      const int64_t row = std::min(i + r, rows.count - 1);
      x[r] = rows.x + row * dim;
      c[r] = rows.centroids + std::max<int64_t>(rows.labels[row], 0) * dim;
    }
    paired_distances<L::kBytes>(x, c, dim, found);
    for (int64_t row = i; row < std::min(i + 4, rows.count); ++row)
      rows.sqdist[row] =
          rows.labels[row] < 0 ? std::numeric_limits<A>::quiet_NaN() : found[row - i];
  }
}

// Tiles: 32 vector registers hold 3 x 8 accumulators (2 x 12 loads more), 16 hold 2 x 6.
template <class A>
using LevelV4 = Level<A, 64, 3, 8>;
template <class A>
using LevelV3 = Level<A, 32, 2, 6>;
#if defined(__aarch64__)
template <class A>
using LevelBase = Level<A, 16, 4, 6>;
#else
template <class A>
using LevelBase = Level<A, 16, 2, 6>;
#endif

template <class A>
FASTIF_TARGET_V4 void assign_rows_v4(const Rows<A>& rows, A* totals) {
  assign_rows<LevelV4<A>>(rows, totals);
}
template <class A>
FASTIF_TARGET_V3 void assign_rows_v3(const Rows<A>& rows, A* totals) {
  assign_rows<LevelV3<A>>(rows, totals);
}
template <class A>
void assign_rows_base(const Rows<A>& rows, A* totals) {
  assign_rows<LevelBase<A>>(rows, totals);
}

}  // namespace

template <class T>
void kmeans_assign_cpu(const KMeansAssign<T>& task, const Pool& pool, SimdLevel level) {
  using A = accumulate_t<T>;
  const auto run = level == SimdLevel::kV4   ? assign_rows_v4<A>
                   : level == SimdLevel::kV3 ? assign_rows_v3<A>
                                             : assign_rows_base<A>;
  const int64_t group = level == SimdLevel::kV4   ? LevelV4<A>::kGroup
                        : level == SimdLevel::kV3 ? LevelV3<A>::kGroup
                                                  : LevelBase<A>::kGroup;
  const int64_t dim = task.dim;
  const auto packed = pack_centroids(task.centroids, task.clusters, dim, group, pool);
  const ErrorBound bound = error_bound<A>(dim, packed.largest_norm);
  constexpr int64_t B = kBlockRows<A>;
  parallel_tasks(pool, ceil_div(task.rows, kTaskRows), [&](int64_t index) {
    const Scratch<A> totals(totals_size<A>(dim, task.clusters, group));
    RowBlock<T> block(std::min(B, task.rows) * dim);
    const int64_t stop = std::min(task.rows, (index + 1) * kTaskRows);
    for (int64_t begin = index * kTaskRows; begin < stop; begin += B) {
      const int64_t count = std::min(B, stop - begin);
      const int64_t ahead = std::min(task.rows, begin + 2 * B);
      const Prefetch upcoming{reinterpret_cast<const char*>(task.x + (begin + count) * dim),
                              reinterpret_cast<const char*>(task.x + ahead * dim)};
      run(Rows<A>{block.values(task.x + begin * dim, count * dim), count, dim, task.clusters,
                  task.centroids, &packed, bound, upcoming, task.labels + begin,
                  task.sqdist + begin},
          totals.get());
    }
  });
}

template void kmeans_assign_cpu(const KMeansAssign<float>&, const Pool&, SimdLevel);
template void kmeans_assign_cpu(const KMeansAssign<double>&, const Pool&, SimdLevel);
template void kmeans_assign_cpu(const KMeansAssign<Half>&, const Pool&, SimdLevel);
template void kmeans_assign_cpu(const KMeansAssign<BFloat16>&, const Pool&, SimdLevel);

}  // namespace fastif
