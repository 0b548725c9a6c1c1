#include "kmeans/kmeans_candidates.h"

#include <algorithm>
#include <vector>

#include "common/simd.h"
#include "kmeans/row_block.h"

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

// kRows x kCount squared distances at once: each vector of x and c loaded is used several times.
template <class A, int kBytes, int kRows, int kCount>
FASTIF_INLINE void distance_tile(const A* x, const A* c, int64_t dim, int64_t stride, A* out) {
  using V = typename VectorOf<A, kBytes>::type;
  constexpr int kLanes = kBytes / int(sizeof(A));
  V sum[kRows][kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) sum[i][j] = V{};
  int64_t k = 0;
  for (; k + kLanes <= dim; k += kLanes) {
    V row[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) row[i] = load_as<V>(x + i * dim + k);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      const V centre = load_as<V>(c + j * dim + k);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const V delta = row[i] - centre;
        sum[i][j] += delta * delta;
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      A lanes[kLanes], total = 0;
      std::memcpy(lanes, &sum[i][j], sizeof(V));
      for (int half = kLanes / 2; half >= 1; half /= 2)
        for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
      for (int64_t rest = k; rest < dim; ++rest) {
        const A delta = x[i * dim + rest] - c[j * dim + rest];
        total += delta * delta;
      }
      out[j * stride + i] = lanes[0] + total;
    }
  }
}

template <class A, int kBytes>
FASTIF_INLINE void distances(const Rows<A>& rows) {
  const int64_t dim = rows.dim;
  for (int64_t i = 0; i < rows.count;) {
    const A* x = rows.x + i * dim;
    const bool pair = i + 2 <= rows.count;
    for (int64_t j = 0; j < rows.candidates;) {
      const A* c = rows.candidate + j * dim;
      A* out = rows.distance + j * rows.stride + i;
      const bool three = j + 3 <= rows.candidates;
      if (pair && three) {
        distance_tile<A, kBytes, 2, 3>(x, c, dim, rows.stride, out);
      } else if (pair) {
        distance_tile<A, kBytes, 2, 1>(x, c, dim, rows.stride, out);
      } else if (three) {
        distance_tile<A, kBytes, 1, 3>(x, c, dim, rows.stride, out);
      } else {
        distance_tile<A, kBytes, 1, 1>(x, c, dim, rows.stride, out);
      }
      j += three ? 3 : 1;
    }
    i += pair ? 2 : 1;
  }
}

template <class A>
FASTIF_TARGET_V4 void distances_v4(const Rows<A>& rows) {
  distances<A, 64>(rows);
}
template <class A>
FASTIF_TARGET_V3 void distances_v3(const Rows<A>& rows) {
  distances<A, 32>(rows);
}
template <class A>
void distances_base(const Rows<A>& rows) {
  distances<A, 16>(rows);
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
    const RowBlock<T> block(task.x + begin * task.dim, count * task.dim);
    run(Rows<A>{block.values(), count, task.dim, task.rows, task.candidate, L, task.least + begin});
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
