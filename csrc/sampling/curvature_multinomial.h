// curvature_multinomial(logits[n,Y], m, seed, row_offset=0, row_scale float64[n]=None, floor=0.0)
//     -> (rows int64[m], log_keys float32[m], log_threshold float32[], skipped int64[1])
//
// One pool of m rows without replacement, with sizes f = floor + curvature_sizes(logits, row_scale)
// added in float32: bit for bit bottom_k(f, m), in one pass and without holding f.
//
// - floor is finite and not negative: a constant share of uniform sampling, the same for every
//   chunk, so that samples of chunks stay mergeable.
// - skipped counts the rows with NaN, or of nothing but -inf. Their curvature is 0: with a positive
//   floor they can be drawn all the same.
// - The sample of a GPU is the CPU's, bit for bit. It holds f, 4 n bytes. It is not waited for:
//   after an error rows are -1, log_keys and log_threshold NaN, and skipped is -(1 + the row).
// - Errors are those of curvature_sizes. Padding, n = 0, chunks, threads: as in bottom_k.
#pragma once

#include <cstdint>

#include "common/gpu.h"
#include "common/parallel.h"
#include "sampling/curvature_sizes.h"
#include "sampling/sample.h"

namespace fastif {

// draw.classes is 1. A row other than -1 comes back where the rows cannot be used.
template <class T>
BadRow curvature_multinomial_cpu(const CurvatureSizes<T>& task, float floor, const Draw& draw,
                                 const Sample& out, int64_t* skipped, const Pool& pool);

template <class T>
void curvature_multinomial_cuda(const CurvatureSizes<T>& task, float floor, const Draw& draw,
                                const Sample& out, int64_t* skipped, const Gpu& gpu);

}  // namespace fastif
