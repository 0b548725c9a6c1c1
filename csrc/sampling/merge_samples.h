// merge_samples(rows_a int64[Y,k], log_keys_a float32[Y,k], log_threshold_a float32[Y],
//               rows_b, log_keys_b, log_threshold_b)
//     -> (rows int64[Y,k], log_keys float32[Y,k], log_threshold float32[Y])
//
// The sample of the union of two disjoint sets of rows from the samples of each, drawn with one
// seed, exactly: the k largest log_keys of both (ties by row id), and as threshold the largest of
// the remaining keys and of both thresholds.
//
// - Each sample is in the order that the operators give: log_keys descending, ties by row id, then
//   (-1, -inf) where there are fewer than k.
// - On a GPU, a sample that an error has left undefined (log_threshold NaN) makes the result so:
//   rows -1, log_keys and log_threshold NaN.
// - Also for one pool: [m], [m] and 0-dim thresholds. k = 0 and Y = 0 work.
#pragma once

#include <cstdint>

#include "common/gpu.h"
#include "sampling/sample.h"

namespace fastif {

struct ConstSample {
  const int64_t* rows;
  const float* log_keys;
  const float* log_threshold;
};

void merge_samples_cpu(const ConstSample& a, const ConstSample& b, int64_t classes, int64_t k,
                       const Sample& out);
void merge_samples_cuda(const ConstSample& a, const ConstSample& b, int64_t classes, int64_t k,
                        const Sample& out, const Gpu& gpu);

}  // namespace fastif
