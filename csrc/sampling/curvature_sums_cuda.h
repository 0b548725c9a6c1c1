// The sums of curvature_terms.h on a GPU. Only *_cuda.cu files include this.
#pragma once

#include <limits>

#include "common/numeric_types.h"
#include "common/warp.h"
#include "sampling/curvature_terms.h"

namespace fastif::curvature {

constexpr int kGroup = 8;  // threads to a run, each with four of its partial sums

struct RowSums {
  double e, e_sq, at_max;

  __device__ __forceinline__ void add(const RowSums& run) {
    e += run.e;
    e_sq += run.e_sq;
    at_max += run.at_max;
  }
};

// Of `length` <= kTermRun classes, over kGroup lanes, each of which gets the result. All lanes of
// the warp must take part; those without a run pass length 0.
template <class T>
__device__ __forceinline__ RowSums group_run_sums(const T* run, int length, accumulate_t<T> max) {
  constexpr int kParts = kTermLanes / kGroup;
  float e[kParts] = {}, e_sq[kParts] = {}, at_max[kParts] = {};
  for (int first = int(threadIdx.x) % kGroup; first < length; first += kTermLanes) {
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      const int j = first + k * kGroup;
      if (j >= length) continue;
      const CurvatureTerm<float> term = curvature_term(float(to_float(run[j]) - max));
      e[k] += term.e;
      e_sq[k] += term.e_sq;
      at_max[k] += term.at_max;
    }
  }
#pragma unroll
  for (int half = kParts / 2; half >= 1; half /= 2) {
#pragma unroll
    for (int k = 0; k < half; ++k) {
      e[k] += e[k + half];
      e_sq[k] += e_sq[k + half];
      at_max[k] += at_max[k + half];
    }
  }
  return {double(group_sum<kGroup>(e[0])), double(group_sum<kGroup>(e_sq[0])),
          double(group_sum<kGroup>(at_max[0]))};
}

// Of a row for each group of kGroup lanes; `longest` classes is the most of any lane of the warp.
template <class T>
__device__ __forceinline__ RowSums group_row_sums(const T* row, int classes, int longest) {
  using A = accumulate_t<T>;
  A max = -std::numeric_limits<A>::infinity();
  for (int j = int(threadIdx.x) % kGroup; j < classes; j += kGroup) {
    const A x = to_float(row[j]);
    max = x > max ? x : max;
  }
  max = group_max<kGroup>(max);
  RowSums sums{0, 0, 0};
  for (int run = 0; run < longest; run += int(kTermRun)) {
    const int rest = classes - run;
    const int length = rest < 0 ? 0 : rest < int(kTermRun) ? rest : int(kTermRun);
    sums.add(group_run_sums(row + (length > 0 ? run : 0), length, max));
  }
  return sums;
}

// Scratch of block_row_sums, in shared memory.
template <int kThreads, class A>
struct BlockSums {
  static constexpr int kGroups = kThreads / kGroup;
  A max[kThreads / kWarp];
  RowSums run[kGroups];
};

// Of one row of any length; thread 0 gets the result.
template <int kThreads, class T>
__device__ __forceinline__ RowSums block_row_sums(const T* row, int64_t classes,
                                                  BlockSums<kThreads, accumulate_t<T>>& shared) {
  using A = accumulate_t<T>;
  constexpr int kGroups = BlockSums<kThreads, A>::kGroups;
  A max = -std::numeric_limits<A>::infinity();
  for (int64_t j = threadIdx.x; j < classes; j += kThreads) {
    const A x = to_float(row[j]);
    max = x > max ? x : max;
  }
  max = block_max<kThreads>(max, shared.max);
  const int group = int(threadIdx.x) / kGroup;
  RowSums total{0, 0, 0};
  for (int64_t first = 0; first < classes; first += kGroups * kTermRun) {
    const int64_t start = first + group * kTermRun, rest = classes - start;
    const int length = int(rest < 0 ? 0 : rest < kTermRun ? rest : kTermRun);
    const RowSums sums = group_run_sums(row + (length > 0 ? start : 0), length, max);
    if (threadIdx.x % kGroup == 0) shared.run[group] = sums;
    __syncthreads();
    if (threadIdx.x == 0)
      for (int g = 0; g < kGroups && first + g * kTermRun < classes; ++g) total.add(shared.run[g]);
    __syncthreads();
  }
  return total;
}

}  // namespace fastif::curvature
