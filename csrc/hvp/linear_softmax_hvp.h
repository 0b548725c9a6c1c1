// linear_softmax_hvp(x[n,d], probs[n,C], v[R,C,d'], weight[n]=None) -> [R,C,d'],  d' = d or d + 1
//
// The exact Hessian product of a softmax linear layer under cross-entropy:
//     sum_i w_i (diag(p_i) - p_i p_i^T) (V_r x_i) x_i^T
// With d' = d + 1 the last column is the bias: x is extended by a one.
//
// - x, probs, v: of one dtype, float32, float64, float16 or bfloat16; the result is float32, or
//   float64 for float64. v may also be [C, d']. weight None means 1: a plain sum, not a mean.
// - Rows go through in blocks whose n x RC intermediate stays in cache: two GEMMs (torch's own, one
//   thread each) around softmax_hvp. Blocks are dealt to groups whose number depends on the shapes
//   alone, and the groups' sums are added in order: the number of threads changes no bit.
// - n = 0 gives zeros. NaN in a row spreads to all of the result, as in the sum itself.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/parallel.h"

namespace fastif {

struct LinearSoftmaxPlan {
  int64_t rows;    // rows per block
  int64_t groups;  // accumulators
};

inline LinearSoftmaxPlan plan_linear_softmax(int64_t n, int64_t d, int64_t outputs) {
  // A block of x and twice its outputs take about 512 kB of floats; an accumulator is outputs x d.
  const int64_t rows =
      std::clamp<int64_t>((1 << 17) / std::max<int64_t>(d + 2 * outputs, 1), 64, 2048);
  const int64_t most = std::clamp<int64_t>((1 << 24) / std::max<int64_t>(outputs * d, 1), 2, 16);
  return {rows, std::max<int64_t>(1, std::min(most, ceil_div(n, rows)))};
}

}  // namespace fastif
