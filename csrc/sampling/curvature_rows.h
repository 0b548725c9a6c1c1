// Curvature sizes of a run of rows, for the two operators that need them.
#pragma once

#include "sampling/curvature_sizes.h"

namespace fastif {

struct CurvatureRun {
  int64_t first_bad;  // index in the run, or its length
  int64_t undefined;  // rows with NaN or of nothing but -inf
};

// sizes[i] for rows begin <= i < end of the task, written to sizes[i - begin].
template <class T>
CurvatureRun curvature_rows(const CurvatureSizes<T>& task, int64_t begin, int64_t end,
                            float* sizes);

template <class T>
BadRow describe_bad_row(const CurvatureSizes<T>& task, int64_t row);

}  // namespace fastif
