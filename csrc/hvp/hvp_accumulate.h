// hvp_accumulate_(acc[R,p] (a!), hvp: Tensor[], weight) -> ()
//
// acc += weight * hvp in one pass: gathers the products of mini-batches without a flattening copy.
//
// - hvp: one tensor [R, *shape] per parameter, as autograd returns it, their sizes adding up to p;
//   of acc's dtype, or float16 or bfloat16 where acc is float32.
// - acc is float32 or float64 and contiguous; arithmetic is in its dtype.
// - Elementwise, so the number of threads changes no bit. p = 0 and R = 0 do nothing.
#pragma once

#include <cstdint>

#include "common/gpu.h"
#include "common/parallel.h"

namespace fastif {

template <class T, class G>
struct HvpAccumulate {
  int64_t right_hand_sides;  // R
  int64_t dim;               // p
  int64_t tensors;           // length of hvp
  const G* const* hvp;       // tensor t: [R, lengths[t]]
  const int64_t* lengths;    // elements of tensor t per right-hand side
  T* acc;                    // [R, p], updated
  double weight;
};

template <class T, class G>
void hvp_accumulate_cpu(const HvpAccumulate<T, G>& task, const Pool& pool);
template <class T, class G>
void hvp_accumulate_cuda(const HvpAccumulate<T, G>& task, const Gpu& gpu);

}  // namespace fastif
