// kmeans_nearest(x[n,d], centroids[K,d], k) -> (index int64[K,k], sqdist[K,k])
//
// For each centroid the k nearest rows among the rows of its own cluster, by kmeans_assign (whose
// contract holds for dtypes, NaN and distances).
//
// - Ascending by (sqdist, row): ties go to the lower row.
// - A cluster of fewer than k rows is padded with index -1 and distance inf. k = 0 works.
// - Threads change no bit. Given the same labels and distances the CPU and a GPU give the same
//   bits; but kmeans_assign's distances agree to rounding, and rows so close may change places.
// - On a GPU n and K are below 2^32 - 1, and it takes up to 32 bytes of scratch memory a row.
#pragma once

#include <cstdint>

#include "common/gpu.h"
#include "common/parallel.h"

namespace fastif {

template <class A>
struct KMeansNearest {
  int64_t rows, clusters, k;
  const int64_t* labels;  // [rows], by kmeans_assign
  const A* row_sqdist;    // [rows], by kmeans_assign
  int64_t* index;         // [clusters, k]
  A* sqdist;              // [clusters, k]
};

template <class A>
void kmeans_nearest_cpu(const KMeansNearest<A>& task, const Pool& pool);

template <class A>
void kmeans_nearest_cuda(const KMeansNearest<A>& task, const Gpu& gpu);

}  // namespace fastif
