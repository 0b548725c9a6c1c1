// softmax_hvp(probs[n,C], z[R,n,C], weight[n]=None) -> u[R,n,C]
//
// The cross-entropy Hessian on logit tangents: u = w (diag(p) - p p^T) z, row by row, computed as
//     u = w p (z - <p, z>)
// with the subtraction first, so that u sums to zero over the classes to rounding.
//
// - probs, z: float32, float64, float16 or bfloat16, of one dtype; arithmetic in float, or double
//   for float64. u and weight are of the arithmetic's dtype. weight None means 1.
// - Rows are independent: the number of threads changes no bit. n, R or C = 0 give an empty u.
// - The CPU and a GPU add up <p, z> in different orders, each in a fixed one.
// - Numbers below the least normal one count as zero on an x86 CPU (common/flush_denormals.h).
// - A row with NaN gives NaN in that row only.
#pragma once

#include <cstdint>

#include "common/gpu.h"
#include "common/numeric_types.h"
#include "common/parallel.h"

namespace fastif {

template <class T>
struct SoftmaxHvp {
  int64_t n, classes, right_hand_sides;
  const T* probs;                 // [n, C]
  const T* z;                     // row i of right-hand side r at i * row_stride + r * rhs_stride
  const accumulate_t<T>* weight;  // [n] or null
  accumulate_t<T>* u;             // laid out as z, and not the same memory
  int64_t row_stride, rhs_stride;
  const accumulate_t<T>* offset = nullptr;  // [R, C] added to every row of z, or null
};

template <class T>
void softmax_hvp_cpu(const SoftmaxHvp<T>& task, const Pool& pool);

template <class T>
void softmax_hvp_cuda(const SoftmaxHvp<T>& task, const Gpu& gpu);

// The same on this thread, for a caller that runs it in a task of its own.
template <class T>
void softmax_hvp_rows(const SoftmaxHvp<T>& task, int64_t begin, int64_t end);

}  // namespace fastif
