// kmeans_assign(x[n,d], centroids[K,d], precision="auto") -> (labels int64[n], sqdist[n])
//
// The nearest centroid of every row, and the squared Euclidean distance to it. Memory beyond the
// inputs and outputs is a copy or two of the centroids and a few row tiles, on a GPU some 40 bytes
// a row: nothing of size n x K.
//
// - Labels are exact: the centroid whose distance is least when computed from the given values in
//   float64; the lowest index among equals. Scores x.c - |c|^2/2 are computed on data from which
//   the mean of the centroids was subtracted: in x's precision (float32 for halves), on a GPU first
//   on its tensor cores, in TF32 or, for halves, float16. A row whose two best scores lie closer
//   than a bound on the rounding error of a score is settled in float64. So labels do not depend on
//   the instruction set, the device, an offset common to the data, or overflow.
// - sqdist is sum((x - c)^2) for that centroid, summed directly, never |x|^2 - 2xc + |c|^2, in
//   float32, or float64 for float64 x. It is inf where it overflows. The CPU and a GPU sum in
//   different orders, each in a fixed one.
// - A row with NaN or inf: label -1, distance NaN. A centroid with NaN or inf is never chosen;
//   where there is no other, all labels are -1.
// - precision "auto" and "fp32": all of the above. "tf32" is the same on the CPU; on a GPU it takes
//   the tensor cores' best score at its word, ties to the lowest index: the label may then be a
//   centroid whose score is less than the best by up to twice the rounding error. float64 rows, and
//   those of fewer than 32 columns or with fewer than 16 centroids, do not use tensor cores.
// - x is float32, float64, float16 or bfloat16; centroids have its dtype, or float32 with half x.
// - K >= 1. n = 0 gives empty results; d = 0 gives label 0 and distance 0.
// - Every row is computed on its own: chunks of rows, threads and blocks change no bit. On a GPU
//   nothing waits for the device: the operator can be captured in a CUDA graph.
#pragma once

#include <cstdint>

#include "common/clones.h"
#include "common/gpu.h"
#include "common/numeric_types.h"
#include "common/parallel.h"

namespace fastif {

template <class T>
struct KMeansAssign {
  using A = accumulate_t<T>;
  int64_t rows, dim, clusters;
  const T* x;          // [rows, dim]
  const A* centroids;  // [clusters, dim]
  int64_t* labels;     // [rows]
  A* sqdist;           // [rows]
  bool exact = true;   // false: see "tf32"
};

// `level`: the instruction set to use, one that the machine has.
template <class T>
void kmeans_assign_cpu(const KMeansAssign<T>& task, const Pool& pool,
                       SimdLevel level = simd_level());

template <class T>
void kmeans_assign_cuda(const KMeansAssign<T>& task, const Gpu& gpu);

}  // namespace fastif
