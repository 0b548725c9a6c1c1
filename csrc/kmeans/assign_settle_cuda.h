// From the best scores to exact labels and distances. Only *_cuda.cu files include this.
#pragma once

#include <cmath>
#include <limits>

#include "kmeans/assign_simt_cuda.h"
#include "kmeans/kmeans_assign.h"

namespace fastif {
namespace {

constexpr int kSettleThreads = 256, kSettleCentroids = 4;

// Four neighbouring values in the type of arithmetic; beyond `count` zeros.
template <class A>
struct Four {
  A value[4];
};
template <class T>
__device__ __forceinline__ Four<accumulate_t<T>> load_four(const T* from, bool whole,
                                                           int64_t count) {
  struct alignas(sizeof(T) == 2 ? 8 : 16) Pack {
    T value[4];
  };
  Four<accumulate_t<T>> four{};
  if (whole && count >= 4) {
    const Pack pack = *reinterpret_cast<const Pack*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) four.value[i] = to_float(pack.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) four.value[i] = to_float(from[i]);
  }
  return four;
}
template <class T>
__device__ __forceinline__ bool loads_whole(const T* from) {
  return reinterpret_cast<uintptr_t>(from) % (sizeof(T) == 2 ? 8 : 16) == 0;
}

// Squared distances of row x to kCount centroids in float64, over a warp, always in one order.
template <int kCount, class T, class A>
__device__ __forceinline__ void wide_distances(const T* x, const A* const (&c)[kCount], int64_t dim,
                                               double (&sums)[kCount]) {
  for (int j = 0; j < kCount; ++j) sums[j] = 0;
#pragma unroll 2
  for (int64_t k = threadIdx.x % kWarp; k < dim; k += kWarp) {
    const double value = double(to_float(x[k]));
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const double delta = value - double(c[j][k]);
      sums[j] += delta * delta;
    }
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) sums[j] = group_sum<kWarp>(sums[j]);
}

// sum((x - c)^2) over a warp.
template <class T, class A>
__device__ __forceinline__ A squared_distance(const T* x, const A* c, int64_t dim) {
  A sum = 0;
  const bool x_whole = loads_whole(x), c_whole = loads_whole(c);
  for (int64_t k = 4 * (threadIdx.x % kWarp); k < dim; k += 4 * kWarp) {
    const Four<A> row = load_four(x + k, x_whole, dim - k), to = load_four(c + k, c_whole, dim - k);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const A delta = row.value[i] - to.value[i];
      sum += delta * delta;
    }
  }
  return group_sum<kWarp>(sum);
}

// x - m as the tensor cores see it; x is exact in T.
template <class T>
__device__ __forceinline__ float rounded_operand(float x, float m) {
  return Operand<T>::value(Operand<T>::centre(Operand<T>::raw(x), Operand<T>::raw(m)), 0);
}

// What a warp learns about a row in one pass.
template <class A>
struct RowFacts {
  A sqdist, norm_sq, lost_sq;
  bool finite;
};

// The squared distance to c; of the row as it was scored, (x - m) rounded to the operands of the
// tensor cores or to A, the squared norm, and that of what rounding changed.
template <bool kTensor, class T, class A>
__device__ __forceinline__ RowFacts<A> row_facts(const T* x, const A* c, const A* mean,
                                                 int64_t dim) {
  RowFacts<A> facts{0, 0, 0, true};
  const bool x_whole = loads_whole(x), c_whole = loads_whole(c);
#pragma unroll 2
  for (int64_t k = 4 * (threadIdx.x % kWarp); k < dim; k += 4 * kWarp) {
    const Four<A> row = load_four(x + k, x_whole, dim - k), to = load_four(c + k, c_whole, dim - k);
    const Four<A> shift = load_four(mean + k, true, dim - k);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const A delta = row.value[i] - to.value[i], centred = row.value[i] - shift.value[i];
      facts.sqdist += delta * delta;
      facts.finite &= std::isfinite(row.value[i]);
      if constexpr (kTensor) {
        const float seen = rounded_operand<T>(row.value[i], shift.value[i]);
        facts.norm_sq += seen * seen;
        facts.lost_sq += (seen - centred) * (seen - centred);
      } else {
        facts.norm_sq += centred * centred;
      }
    }
  }
  facts.sqdist = group_sum<kWarp>(facts.sqdist);
  facts.norm_sq = group_sum<kWarp>(facts.norm_sq);
  if (kTensor) facts.lost_sq = group_sum<kWarp>(facts.lost_sq);
  facts.finite = __all_sync(kWholeWarp, facts.finite);
  return facts;
}

// A bound on the error of every score of a row; inf where a score may have overflowed.
//
// With x' = x - m and c' exact, scored as a = x' + e and b = c' + f, the product's error is
// e.c' + a.f <= |e||c'| + |a||f|, before the rounding of the sum itself. A chain of dim
// multiply-adds adds at most dim u |a||b|. Tensor cores align the products of 4 columns or more and
// the sum to the largest of them and cut off what is below its 24 bits (undocumented; measured by
// Fasi et al. 2021, doi.org/10.7717/peerj-cs.330): at most 6 units of 2u, for 5 terms and their
// sum, to 4 columns. The seed, and the sum with it, are rounded once more each. Products that
// underflow lose up to the smallest normal number each. 1 % on top covers terms of order u^2 and
// float64's own rounding.
template <bool kTensor, class A>
__device__ __forceinline__ double score_error(const RowFacts<A>& facts,
                                              const Centroids<A>& centroids) {
  constexpr double u = std::numeric_limits<A>::epsilon() / 2.0;
  constexpr double least = double(std::numeric_limits<A>::min());
  const double dim = double(centroids.dim), C = centroids.largest_norm();
  // The norms' own rounding, relative; squares that underflow, absolute.
  const double slack = 1 + 2 * u * (dim + 16), floor = std::sqrt(dim * least);
  const double norm = std::sqrt(double(facts.norm_sq)) * slack + floor;
  const double lost = std::sqrt(double(facts.lost_sq)) * slack + floor + u * norm;
  const double lost_c = kTensor ? centroids.largest_loss() : u * C;
  const double product = norm * (C + lost_c);
  const double chain = kTensor ? (3 * dim + 32) * u : (dim + 8) * u;
  const double error = 1.01 * (lost * C + norm * lost_c + (chain + 2 * u) * product +
                               2 * u * C * C + (dim + 1) * least);
  const bool overflow = !(product + C * C < double(std::numeric_limits<A>::max()) / 8);
  return overflow ? std::numeric_limits<double>::infinity() : error;
}

// Whether distance a of centroid i precedes distance b of centroid j.
__device__ __forceinline__ bool nearer(double a, int i, double b, int j) {
  return a < b || (a == b && i < j);
}

// A warp to a row: takes the best of its shares' results. Where the gap to the second best proves
// the label, or (exact = false) an error bound exists at all, it is final; where the third proves
// that only two centroids can be nearest, float64 decides between them; else the row joins `open`.
template <bool kTensor, class T>
__global__ void __launch_bounds__(kSettleThreads, 2)
    certify(KMeansAssign<T> task, Centroids<accumulate_t<T>> centroids,
            const TopThree<accumulate_t<T>>* found, Shares shares, bool exact, RowList list,
            RowList open) {
  using A = accumulate_t<T>;
  const int64_t rows = list.size(task.rows), dim = task.dim;
  constexpr int kWarps = kSettleThreads / kWarp;
  shares = shares.of(rows, Simt<A>::kTile);
  for (int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; i < rows;
       i += int64_t{gridDim.x} * kWarps) {
    TopThree<A> top = found[i];
    for (int share = 1; share < shares.count; ++share) top.add(found[share * rows + i]);
    const int64_t row = list.at(i);
    const T* x = task.x + row * dim;
    const bool scored = top.index != TopThree<A>::kNone;
    int label = scored ? top.index : 0;
    const RowFacts<A> facts =
        row_facts<kTensor>(x, task.centroids + label * dim, centroids.mean, dim);
    A sqdist = facts.sqdist;
    if (!facts.finite) {
      label = -1;
      sqdist = std::numeric_limits<A>::quiet_NaN();
    } else {
      const double window = 2 * score_error<kTensor>(facts, centroids), best = double(top.best);
      const bool proven = scored && (exact ? best - double(top.second) > window
                                           : window < std::numeric_limits<double>::infinity());
      if (!proven) {
        if (!(scored && best - double(top.third) > window)) {
          if (threadIdx.x % kWarp == 0) open.append(row);
          continue;
        }
        const A* const pair[2] = {task.centroids + top.index * dim,
                                  task.centroids + top.runner_up * dim};
        double distance[2];
        wide_distances(x, pair, dim, distance);
        if (nearer(distance[1], top.runner_up, distance[0], top.index)) {
          label = top.runner_up;
          sqdist = squared_distance(x, pair[1], dim);
        }
      }
    }
    if (threadIdx.x % kWarp != 0) continue;
    task.labels[row] = label;
    task.sqdist[row] = sqdist;
  }
}

// A block to a row of the list: every finite centroid in float64, four to a warp at a time, which
// share the conversion of x.
template <class T>
__global__ void __launch_bounds__(kSettleThreads)
    settle(KMeansAssign<T> task, const unsigned char* finite, RowList open) {
  using A = accumulate_t<T>;
  constexpr int kWarps = kSettleThreads / kWarp;
  __shared__ double least_of[kWarps];
  __shared__ int label_of[kWarps];
  const int warp = int(threadIdx.x / kWarp), lane = int(threadIdx.x % kWarp);
  const int clusters = int(task.clusters);
  const int64_t rows = int64_t(*open.count);
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const int64_t row = open.rows[i];
    const T* x = task.x + row * task.dim;
    double least = std::numeric_limits<double>::infinity();
    int label = INT_MAX;
    for (int64_t first = warp * kSettleCentroids; first < clusters;
         first += kWarps * kSettleCentroids) {
      const A* c[kSettleCentroids];
      double distance[kSettleCentroids];
#pragma unroll
      for (int j = 0; j < kSettleCentroids; ++j)
        c[j] = task.centroids + (first + j < clusters ? first + j : first) * task.dim;
      wide_distances(x, c, task.dim, distance);
#pragma unroll
      for (int j = 0; j < kSettleCentroids; ++j) {
        const int index = int(first) + j;
        if (index < clusters && finite[index] && nearer(distance[j], index, least, label)) {
          least = distance[j];
          label = index;
        }
      }
    }
    if (lane == 0) {
      least_of[warp] = least;
      label_of[warp] = label;
    }
    __syncthreads();
    if (warp == 0) {
      for (int w = 1; w < kWarps; ++w) {
        if (!nearer(least_of[w], label_of[w], least, label)) continue;
        least = least_of[w];
        label = label_of[w];
      }
      const bool none = label == INT_MAX;
      const A sqdist =
          squared_distance(x, task.centroids + (none ? 0 : label) * task.dim, task.dim);
      if (lane == 0) {
        task.labels[row] = none ? -1 : label;
        task.sqdist[row] = none ? std::numeric_limits<A>::quiet_NaN() : sqdist;
      }
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace fastif
