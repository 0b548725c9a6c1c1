// linear_softmax_hvp(x[n,d], probs[n,C], v[R,C,d'], weight[n]=None) -> [R,C,d'],  d' = d or d + 1
//
// The exact Hessian product of a softmax linear layer under cross-entropy:
//     sum_i w_i (diag(p_i) - p_i p_i^T) (V_r x_i) x_i^T
// With d' = d + 1 the last column is the bias: x is extended by a one.
//
// - x, probs, v: of one dtype, float32, float64, float16 or bfloat16; the result is float32, or
//   float64 for float64. v may also be [C, d']. weight None means 1: a plain sum, not a mean.
// - Rows go through in blocks whose n x RC intermediate stays in cache: two products around
//   softmax_hvp. On the CPU these are own kernels, which read x once and as it is stored; on a GPU
//   they are torch's GEMMs.
// - On the CPU, blocks are dealt to groups whose number depends on the shapes alone, and their
//   sums are added in order: the number of threads changes no bit.
// - Numbers below the least normal one count as zero on an x86 CPU (common/flush_denormals.h).
// - n = 0 gives zeros. NaN in a row spreads to all of the result, as in the sum itself.
#pragma once

#include <cstdint>

#include "common/numeric_types.h"
#include "common/parallel.h"

namespace fastif {

template <class T>
struct LinearSoftmaxHvp {
  int64_t n, dim, classes, right_hand_sides;
  bool bias;
  const T* x;                     // [n, d]
  const T* probs;                 // [n, C]
  const accumulate_t<T>* v;       // [R, C, d']
  const accumulate_t<T>* weight;  // [n] or null
  accumulate_t<T>* result;        // [R, C, d']
};

template <class T>
void linear_softmax_hvp_cpu(const LinearSoftmaxHvp<T>& task, const Pool& pool);

}  // namespace fastif
