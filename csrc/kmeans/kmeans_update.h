// kmeans_update(x[n,d], labels int64[n], n_clusters, weight[n]=None)
//     -> (sums[K,d], counts int64[K])
//
// The sum of the rows of each cluster, and their number: centroids are sums / counts.
//
// - sums are float32, float64 for float64 x. Up to 1024 rows of a cluster, in ascending order, are
//   summed in that type, four at a time; longer clusters go on in float64.
// - weight multiplies each row in sums; counts do not know of it. It has the dtype of sums.
// - Rows with label -1 are ignored. Other labels outside [0, K) are an error, naming the row. On a
//   GPU, which cannot tell without waiting, they make all counts -1 and all sums NaN instead.
// - An empty cluster has sum and count 0; n = 0, d = 0 and K = 0 work. NaN and inf in x propagate.
// - Deterministic: the order of summation depends on the labels alone; threads change no bit.
// - The CPU and a GPU give the same bits without weight; with it the same to rounding, as the CPU's
//   instruction set decides whether products are rounded before they are added.
// - On a GPU n and K are below 2^32 - 1. It takes 16 bytes of scratch memory a row, and sums of
//   n/512 rows.
#pragma once

#include <cstdint>

#include "common/gpu.h"
#include "common/numeric_types.h"
#include "common/parallel.h"

namespace fastif {

constexpr int64_t kUpdatePiece = 1024;  // rows summed in A before the sum goes on in double

// Full vectors of columns add four rows as (r0 + r1) + (r2 + r3) to the sum, and the last one to
// three of a piece one by one. The columns behind them add up to four rows from left to right, and
// then to the sum.
template <class T>
constexpr int64_t kUpdateLanes = 64 / int64_t(sizeof(accumulate_t<T>));

template <class T>
struct KMeansUpdate {
  using A = accumulate_t<T>;
  int64_t rows, dim, clusters;
  const T* x;             // [rows, dim]
  const int64_t* labels;  // [rows]
  const A* weight;        // [rows] or null
  A* sums;                // [clusters, dim]
  int64_t* counts;        // [clusters]
};

// Returns -1, or the first row whose label is outside [-1, clusters): then nothing was computed.
template <class T>
int64_t kmeans_update_cpu(const KMeansUpdate<T>& task, const Pool& pool);

template <class T>
void kmeans_update_cuda(const KMeansUpdate<T>& task, const Gpu& gpu);

}  // namespace fastif
