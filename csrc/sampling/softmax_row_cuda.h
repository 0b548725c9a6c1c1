// softmax_stats.h on a GPU: the bits of softmax_row.h. Only *_cuda.cu files include this.
#pragma once

#include "common/numeric_types.h"
#include "common/warp.h"
#include "sampling/softmax_stats.h"

namespace fastif {

struct SoftmaxSums {
  double sum, at_max;
};

// Of one run of a row, over a group of kSumLanes lanes. All lanes of the warp must take part; those
// without a run pass length 0.
template <class T>
__device__ __forceinline__ SoftmaxSums group_softmax_sums(const T* run, int length, double max) {
  SoftmaxSums sums{0, 0};
  for (int j = int(threadIdx.x) % kSumLanes; j < length; j += kSumLanes) {
    const double x = to_float(run[j]);
    double d = x - max;
    d = d < kLeastExponent ? kLeastExponent : d;  // keeps NaN
    sums.at_max += x == max ? 1.0 : 0.0;
    sums.sum += x == max ? 0.0 : exact_exp(d);
  }
  return {group_sum<kSumLanes>(sums.sum), group_sum<kSumLanes>(sums.at_max)};
}

// A row of at most kSumRun classes for each group of kSumLanes lanes; all of these get the result.
// All lanes of the warp must take part; those without a row pass classes = 0.
template <class T>
__device__ __forceinline__ SoftmaxRow group_softmax_row(const T* row, int classes) {
  double max = -std::numeric_limits<double>::infinity();
  for (int j = int(threadIdx.x) % kSumLanes; j < classes; j += kSumLanes) {
    const double x = to_float(row[j]);
    max = x > max ? x : max;
  }
  max = group_max<kSumLanes>(max);
  const SoftmaxSums sums = group_softmax_sums(row, classes, max);
  return SoftmaxRow::of(max, sums.sum, sums.at_max);
}

// Scratch of block_softmax_row, in shared memory.
template <int kThreads>
struct SoftmaxRowShared {
  static constexpr int kGroups = kThreads / kSumLanes;
  double max[kThreads / kWarp];
  SoftmaxSums run[kGroups];
  SoftmaxSums total;
};

// A row of any length for a block of kThreads threads; all of these get the result.
template <int kThreads, class T>
__device__ __forceinline__ SoftmaxRow block_softmax_row(const T* row, int64_t classes,
                                                        SoftmaxRowShared<kThreads>& shared) {
  using Shared = SoftmaxRowShared<kThreads>;
  double max = -std::numeric_limits<double>::infinity();
  for (int64_t j = threadIdx.x; j < classes; j += kThreads) {
    const double x = to_float(row[j]);
    max = x > max ? x : max;
  }
  if (threadIdx.x == 0) shared.total = {0, 0};
  max = block_max<kThreads>(max, shared.max);
  const int group = int(threadIdx.x) / kSumLanes;
  for (int64_t first = 0; first < classes; first += Shared::kGroups * kSumRun) {
    const int64_t start = first + group * kSumRun, rest = classes - start;
    const int length = int(rest < 0 ? 0 : rest < kSumRun ? rest : kSumRun);
    const SoftmaxSums sums = group_softmax_sums(row + (length > 0 ? start : 0), length, max);
    if (threadIdx.x % kSumLanes == 0) shared.run[group] = sums;
    __syncthreads();
    if (threadIdx.x == 0) {
      SoftmaxSums total = shared.total;
      for (int g = 0; g < Shared::kGroups && first + g * kSumRun < classes; ++g) {
        total.sum += shared.run[g].sum;
        total.at_max += shared.run[g].at_max;
      }
      shared.total = total;
    }
    __syncthreads();
  }
  const SoftmaxSums total = shared.total;
  __syncthreads();  // the scratch may be used again
  return SoftmaxRow::of(max, total.sum, total.at_max);
}

}  // namespace fastif
