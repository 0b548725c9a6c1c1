// class_multinomial(logits[n,Y], k, replacement, seed, row_offset=0)
//     -> (rows int64[Y,k], log_keys float32[Y,k], log_threshold float32[Y], skipped int64[1])
//
// For every class y: k rows drawn with probability proportional to p = softmax(logits[i])[y],
// without replacement (successive sampling, the law of torch.multinomial(p[:, y], k)) or with it
// (k independent draws). common/bottom_k.h defines keys, order and threshold; sizes are
// p = exp(x_y - max - log1p(rest)) in double from the row as it is stored (softmax_row.h).
//
// - rows are global: row_offset + i. The sample is a function of (seed, global row, class, logits):
//   chunks merged with merge_samples, threads, task order and SIMD levels change no bit.
// - Fewer than k rows of positive probability: -1 in rows, -inf in log_keys; never a row of zero
//   probability. k may exceed n; n = 0 and Y = 0 work. n has no limit, Y < 2^31.
// - A logit of -inf has probability zero. A row with NaN, or of nothing but -inf, is skipped and
//   counted. +inf in a row without NaN is an error that names the row.
// - logits: float32, float64, float16 or bfloat16, contiguous.
// - On a GPU, which is not waited for, rows are -1 and log_keys and log_threshold NaN after such an
//   error, and skipped is -(1 + the row). The sample is the CPU's, bit for bit.
// - Extra memory O(threads * k * Y); on a GPU (72 k + 4096) Y bytes (up to twice that for
//   k > 300), and 16 n for Y > 4096.
#pragma once

#include <cstdint>

#include "common/gpu.h"
#include "common/parallel.h"
#include "sampling/sample.h"

namespace fastif {

// Returns the first row (not global) with +inf, or -1. Then nothing but that is to be used.
template <class T>
int64_t class_multinomial_cpu(const T* logits, int64_t n, const Draw& draw, const Sample& out,
                              int64_t* skipped, const Pool& pool);

template <class T>
void class_multinomial_cuda(const T* logits, int64_t n, const Draw& draw, const Sample& out,
                            int64_t* skipped, const Gpu& gpu);

}  // namespace fastif
