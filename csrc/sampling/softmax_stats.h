// Softmax statistics of one row of logits in double, to about 1e-15: what class sizes and final
// keys are defined by. softmax_row.h computes them on a CPU, softmax_row_cuda.h on a GPU: the same
// bits, by exact_math.h and one order of additions.
#pragma once

#include <cstdint>
#include <limits>

#include "common/exact_math.h"
#include "common/host_device.h"

namespace fastif {

enum class RowKind {
  kRegular,
  kUndefined,  // has NaN, or is -inf throughout: its softmax does not exist
  kInfinite,   // has +inf and no NaN
};

// Terms of class j go to partial sum j % 8 of their run of kSumRun classes; (0 + 4) + (2 + 6) and
// (1 + 5) + (3 + 7) are added, and the runs' sums in turn. Runs let the threads of a GPU share a
// long row.
constexpr int64_t kSumRun = 4096;
constexpr int kSumLanes = 8;
// exp(x - max) below exp of this is taken for it: no logarithm of a sum with 1 feels it.
constexpr double kLeastExponent = -340.0;

struct SoftmaxRow {
  RowKind kind;
  double max;
  double rest;  // sum over the others of exp(x - max): the whole sum is 1 + rest

  // From the sum over x != max, and the number of x == max.
  FASTIF_HOST_DEVICE static SoftmaxRow of(double max, double sum, double at_max) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    SoftmaxRow row{RowKind::kRegular, max, sum + (at_max - 1)};
    if (row.rest != row.rest || max == -kInfinity)
      row.kind = RowKind::kUndefined;
    else if (max == kInfinity)
      row.kind = RowKind::kInfinite;
    return row;
  }
  FASTIF_HOST_DEVICE double log_probability(double logit) const {
    return logit - max - exact_log1p(rest);
  }
};

}  // namespace fastif
