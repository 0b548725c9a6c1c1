// kmeans_candidates(x[n,d], candidates[L,d], sqdist[n], weight[n]=None)
//     -> (least[L,n], potential float64[L])
//
// A step of greedy k-means++: what each of L candidates, as one more centroid, would make of the
// rows' squared distances to their nearest centroid,
//     least[l,i] = min(sqdist[i], |x_i - candidate_l|^2),
//     potential[l] = sum_i weight_i least[l,i].
//
// - Distances are directly summed, in float32, or float64 for float64 x; sqdist, weight and least
//   have that dtype, candidates that or x's. The potential is summed in float64.
// - A distance that is NaN leaves sqdist[i] as it is.
// - L = 0, n = 0 and d = 0 work.
// - Deterministic: fixed chunks of rows, summed in order; threads change no bit.
// - The CPU and a GPU give the same to rounding. A GPU reads x once for each 12 candidates.
#pragma once

#include <cstdint>

#include "common/clones.h"
#include "common/gpu.h"
#include "common/numeric_types.h"
#include "common/parallel.h"

namespace fastif {

template <class T>
struct KMeansCandidates {
  using A = accumulate_t<T>;
  int64_t rows, dim, candidates;
  const T* x;          // [rows, dim]
  const A* candidate;  // [candidates, dim]
  const A* sqdist;     // [rows]
  const A* weight;     // [rows] or null
  A* least;            // [candidates, rows]
  double* potential;   // [candidates]
};

// `level`: the instruction set to use, one that the machine has.
template <class T>
void kmeans_candidates_cpu(const KMeansCandidates<T>& task, const Pool& pool,
                           SimdLevel level = simd_level());

template <class T>
void kmeans_candidates_cuda(const KMeansCandidates<T>& task, const Gpu& gpu);

}  // namespace fastif
