// kmeans_weighted(x[n,d], centroids[K,d], k, seed) -> index int64[K,k]
//
// For each centroid k rows of its own cluster (by kmeans_assign, whose contract holds), drawn one
// after the other without replacement, each time with probability proportional to 1/distance.
//
// - Row i has rank E_i d_i with d_i its distance and E_i = -log1p(-u_i) exponential; the k smallest
//   ranks are kept, in that order, ties to the lower row. This is the law of successive sampling
//   (Efraimidis & Spirakis 2006). u_i = uniform(seed, i) of common/philox.h: a function of the seed
//   and the row alone.
// - Rows at distance 0 have infinite weight: they come first, lower rows before higher ones.
// - A cluster of fewer than k rows is padded with -1. k = 0 works.
// - Threads change no bit. Given the same labels and distances the CPU and a GPU draw the same
// rows:
//   ranks are the same bits. kmeans_assign's distances agree to rounding, so two ranks as close may
//   still change places.
// - On a GPU n and K are below 2^32 - 1, and it takes up to 32 bytes of scratch memory a row.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/gpu.h"
#include "common/parallel.h"
#include "common/philox.h"

namespace fastif {

template <class A>
struct KMeansWeighted {
  int64_t rows, clusters, k;
  uint64_t seed;
  const int64_t* labels;  // [rows], by kmeans_assign
  const A* row_sqdist;    // [rows], by kmeans_assign
  int64_t* index;         // [clusters, k]
};

// The rank of a row. A root and a product are rounded alike everywhere.
FASTIF_HOST_DEVICE inline double distance_rank(uint64_t seed, int64_t row, double sqdist) {
  return exponential(uniform(seed, uint64_t(row))) * std::sqrt(sqdist);
}

template <class A>
void kmeans_weighted_cpu(const KMeansWeighted<A>& task, const Pool& pool);

template <class A>
void kmeans_weighted_cuda(const KMeansWeighted<A>& task, const Gpu& gpu);

}  // namespace fastif
