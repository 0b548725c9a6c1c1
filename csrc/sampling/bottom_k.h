// bottom_k(weights[R,n], k, replacement, seed, row_offset=0, require_k=False)
//     -> (rows int64[R,k], log_keys float32[R,k], log_threshold float32[R])
//
// For every line r of weights: k positions drawn with probability proportional to weights[r],
// without replacement (successive sampling, torch.multinomial's law) or with it. The definition
// stands in common/bottom_k.h; position i of line r is row row_offset + i of class r, and its size
// is weights[r, i] as a double. So weights = p.T draws with class_multinomial's random numbers.
//
// - Weights are finite and not negative, with any sum; anything else is an error that names the
//   element. float32, float64, float16, bfloat16; any strides.
// - Fewer than k positive weights: -1 in rows, -inf in log_keys, or, with require_k, an error that
//   names the line. Never a zero weight. k may exceed n; n = 0 and R = 0 work. n has no limit.
// - Chunks along n, merged with merge_samples, give the sample of the whole; threads and task order
//   change no bit. Extra memory O(threads * k * R).
// - The sample of a GPU is the CPU's, bit for bit. It is not waited for: after an invalid weight
//   all rows are -1, log_keys and log_threshold NaN, and require_k is for the caller to check.
#pragma once

#include <cstdint>

#include "common/gpu.h"
#include "common/parallel.h"
#include "sampling/sample.h"

namespace fastif {

template <class T>
struct Weights {
  const T* data;
  int64_t lines, n;                  // R, n
  int64_t line_stride, step_stride;  // of weights[r, i] in elements
};

// Returns the first invalid element as r * n + i, or -1. Then nothing but that is to be used.
template <class T>
int64_t bottom_k_cpu(const Weights<T>& weights, const Draw& draw, const Sample& out,
                     const Pool& pool);

template <class T>
void bottom_k_cuda(const Weights<T>& weights, const Draw& draw, const Sample& out, const Gpu& gpu);

}  // namespace fastif
