#include "kmeans/kmeans_candidates.h"

#include <algorithm>
#include <vector>

#include "common/simd.h"
#include "kmeans/row_block.h"
#include "kmeans/row_distances.h"

namespace fastif {
namespace {

constexpr int64_t kTaskRows = 256;

template <class A>
struct Rows {
  const A* x;
  int64_t count, dim, stride;  // stride: from one candidate's distances to the next one's
  const A* candidate;
  int64_t candidates;
  A* distance;
};

// Squared distances of four rows to kCount candidates at once: each vector that is loaded is used
// several times. Row i is at x[i].
template <class A, int kBytes, int kCount>
FASTIF_INLINE void distance_tile(const A* const (&x)[4], const A* c, int64_t dim, A* out) {
  using V = typename VectorOf<A, kBytes>::type;
  constexpr int kLanes = kBytes / int(sizeof(A));
  V sum[kCount][4];
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[j][i] = V{};
  int64_t k = 0;
  for (; k + kLanes <= dim; k += kLanes) {
    V row[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) row[i] = load_as<V>(x[i] + k);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      const V centre = load_as<V>(c + j * dim + k);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const V delta = row[i] - centre;
        sum[j][i] += delta * delta;
      }
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j) {
    sum_lanes_of_four(sum[j], out + 4 * j);
    for (int64_t rest = k; rest < dim; ++rest) {
      for (int i = 0; i < 4; ++i) {
        const A delta = x[i][rest] - c[j * dim + rest];
        out[4 * j + i] += delta * delta;
      }
    }
  }
}

// distance_tile for `count` <= kCount candidates.
template <class A, int kBytes, int kCount>
FASTIF_INLINE void distance_tiles(int64_t count, const A* const (&x)[4], const A* c, int64_t dim,
                                  A* out) {
  if (count == kCount) {
    distance_tile<A, kBytes, kCount>(x, c, dim, out);
  } else if constexpr (kCount > 1) {
    distance_tiles<A, kBytes, kCount - 1>(count, x, c, dim, out);
  }
}

// kCount: candidates whose sums, with four rows, fill the vector registers.
template <class A, int kBytes, int kCount>
FASTIF_INLINE void distances(const Rows<A>& rows) {
  const int64_t dim = rows.dim;
  for (int64_t i = 0; i < rows.count; i += 4) {
    // The last rows go through a block of four in which the last is repeated.
    const int64_t last = rows.count - 1 - i;
    const A* x[4];
    for (int64_t r = 0; r < 4; ++r) x[r] = rows.x + (i + std::min(r, last)) * dim;
    for (int64_t j = 0; j < rows.candidates;) {
      const A* c = rows.candidate + j * dim;
      A block[kCount * 4];
      const int64_t count = std::min<int64_t>(kCount, rows.candidates - j);
      distance_tiles<A, kBytes, kCount>(count, x, c, dim, block);
      for (const A* found = block; found < block + 4 * count; found += 4, ++j) {
        std::copy(found, found + std::min<int64_t>(4, last + 1),
                  rows.distance + j * rows.stride + i);
      }
    }
  }
}

template <class A>
FASTIF_TARGET_V4 void distances_v4(const Rows<A>& rows) {
  distances<A, 64, 4>(rows);
}
template <class A>
FASTIF_TARGET_V3 void distances_v3(const Rows<A>& rows) {
  distances<A, 32, 2>(rows);
}
template <class A>
void distances_base(const Rows<A>& rows) {
  distances<A, 16, 2>(rows);
}

// distance <- min(sqdist, distance); returns the weighted sum.
template <class A>
double take_least(const A* sqdist, const A* weight, int64_t count, A* distance) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    distance[i] = distance[i] < sqdist[i] ? distance[i] : sqdist[i];
    sum += weight != nullptr ? double(weight[i]) * double(distance[i]) : double(distance[i]);
  }
  return sum;
}

}  // namespace

template <class T>
void kmeans_candidates_cpu(const KMeansCandidates<T>& task, const Pool& pool, SimdLevel level) {
  using A = accumulate_t<T>;
  const auto run = level == SimdLevel::kV4   ? distances_v4<A>
                   : level == SimdLevel::kV3 ? distances_v3<A>
                                             : distances_base<A>;
  const int64_t chunks = ceil_div(task.rows, kTaskRows), L = task.candidates;
  std::vector<double> sums(chunks * L, 0.0);
  parallel_tasks(pool, chunks, [&](int64_t index) {
    const int64_t begin = index * kTaskRows, count = std::min(kTaskRows, task.rows - begin);
    RowBlock<T> block(count * task.dim);
    const A* x = block.values(task.x + begin * task.dim, count * task.dim);
    run(Rows<A>{x, count, task.dim, task.rows, task.candidate, L, task.least + begin});
    for (int64_t l = 0; l < L; ++l) {
      sums[index * L + l] =
          take_least(task.sqdist + begin, task.weight ? task.weight + begin : nullptr, count,
                     task.least + l * task.rows + begin);
    }
  });
  for (int64_t l = 0; l < L; ++l) {
    task.potential[l] = 0;
    for (int64_t c = 0; c < chunks; ++c) task.potential[l] += sums[c * L + l];
  }
}

template void kmeans_candidates_cpu(const KMeansCandidates<float>&, const Pool&, SimdLevel);
template void kmeans_candidates_cpu(const KMeansCandidates<double>&, const Pool&, SimdLevel);
template void kmeans_candidates_cpu(const KMeansCandidates<Half>&, const Pool&, SimdLevel);
template void kmeans_candidates_cpu(const KMeansCandidates<BFloat16>&, const Pool&, SimdLevel);

}  // namespace fastif
