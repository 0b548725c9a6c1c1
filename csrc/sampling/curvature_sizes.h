// curvature_sizes(logits[n,Y], row_scale float64[n]=None) -> sizes float32[n]
//
// The trace of each row's softmax Hessian diag(p) - p p^T,
//     size = sum_y p_y (1 - p_y) * row_scale,
// from terms in float32, added up without the cancellation of 1 - sum_y p_y^2 in confident rows
// (curvature_terms.h): to 1e-6 relative, or, where that is more, 6e-8 times the difference of the
// row's two largest logits. Classes 105 or more below the largest count as 0. The product is in
// double and rounded to float32.
//
// - A row with NaN, or of nothing but -inf, has size 0. +inf in a row without NaN is an error.
// - row_scale is finite and not negative, and so is its product as a float32; else an error.
// - On a GPU, which is not waited for, the size of such a row is NaN instead of an error.
// - Each row stands alone: chunks, threads, SIMD levels and the device change no bit. n = 0 and Y =
// 0 (size 0) work.
// - logits: float32, float64, float16 or bfloat16, contiguous.
#pragma once

#include <cstdint>

#include "common/gpu.h"
#include "common/parallel.h"

namespace fastif {

template <class T>
struct CurvatureSizes {
  const T* logits;  // [n, Y]
  int64_t n, classes;
  const double* row_scale;  // [n] or null
};

// The first row that cannot be used and why.
struct BadRow {
  int64_t row = -1;
  bool infinite_logit = false;  // else its scale is at fault
};

template <class T>
BadRow curvature_sizes_cpu(const CurvatureSizes<T>& task, float* sizes, const Pool& pool);

// sizes + floor, NaN for rows that cannot be used. Counts into skipped the rows without a softmax,
// and lowers bad to the first row that cannot be used; both may be null.
template <class T>
void curvature_sizes_cuda(const CurvatureSizes<T>& task, float* sizes, const Gpu& gpu,
                          float floor = 0, unsigned long long* skipped = nullptr,
                          unsigned long long* bad = nullptr);

}  // namespace fastif
