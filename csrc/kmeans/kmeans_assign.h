// kmeans_assign(x[n,d], centroids[K,d], precision="auto") -> (labels int64[n], sqdist[n])
//
// The nearest centroid of every row, and the squared Euclidean distance to it. Memory beyond the
// inputs and outputs is a copy of the centroids and a few row tiles: nothing of size n x K.
//
// - Labels are exact: the centroid whose distance is least when computed from the given values in
//   float64; the lowest index among equals. Scores |c|^2/2 - xc are computed in x's precision
//   (float32 for halves) on data from which the mean of the centroids was subtracted. A row whose
//   two best scores lie closer than the proven rounding error of a score is settled in float64. So
//   labels do not depend on the instruction set, an offset common to the data, or overflow.
// - sqdist is sum((x - c)^2) for that centroid, summed directly, never |x|^2 - 2xc + |c|^2:
// float32,
//   or float64 for float64 x. It is inf where it overflows.
// - A row with NaN or inf: label -1, distance NaN. A centroid with NaN or inf is never chosen;
// where
//   there is no other, all labels are -1.
// - precision "auto", "fp32" and "tf32" are the same on the CPU: all of the above.
// - x is float32, float64, float16 or bfloat16; centroids have its dtype, or float32 with half x.
// - K >= 1. n = 0 gives empty results; d = 0 gives label 0 and distance 0.
// - Every row is computed on its own: chunks of rows and threads change no bit.
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
