// lissa_update_(h[R,p] (a!), v[R,p], hvp: Tensor[], damping, scale, mask[p]=None)
//     -> (delta_sq float64[R], norm_sq float64[R], finite bool[R])
//
// One step of the LiSSA recursion, in one pass over memory:
//     h <- v + (1 - damping/scale) h - hvp/scale
// with, for each of the R right-hand sides, |h_new - h_old|^2, |h_new|^2 and whether h_new is
// finite.
//
// - hvp is the product H h as autograd returns it: one tensor [R, *shape] per parameter, in order,
//   their sizes adding up to p. It may be float16 or bfloat16 where h is float32.
// - h and v are float32 or float64, of one dtype; h is contiguous. Arithmetic is in h's dtype,
//   the two norms are summed in double, in an order of each device's own.
// - mask: where it is false, h is set to zero and nothing is counted.
// - Deterministic: fixed chunks, summed in chunk order; the number of threads changes no bit.
// - p = 0 and R = 0 give zero norms and finite = true.
#pragma once

#include <cstdint>

#include "common/gpu.h"
#include "common/parallel.h"

namespace fastif {

template <class T, class G>
struct LissaUpdate {
  int64_t right_hand_sides;  // R
  int64_t dim;               // p
  int64_t tensors;           // length of hvp
  const G* const* hvp;       // tensor t: [R, lengths[t]]
  const int64_t* lengths;    // elements of tensor t per right-hand side
  T* h;                      // [R, p], updated
  const T* v;                // [R, p]
  const bool* mask;          // [p] or null
  double damping, scale;
  double *delta_sq, *norm_sq;  // [R]
  bool* finite;                // [R]
};

template <class T, class G>
void lissa_update_cpu(const LissaUpdate<T, G>& task, const Pool& pool);
template <class T, class G>
void lissa_update_cuda(const LissaUpdate<T, G>& task, const Gpu& gpu);

}  // namespace fastif
