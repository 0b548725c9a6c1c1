// The k smallest of each cluster, by (key, row), on a GPU: smallest.h there. Only *_cuda.cu files
// include this.
#pragma once

#include <bit>
#include <limits>
#include <type_traits>

#include "common/launch.h"
#include "kmeans/clusters_cuda.h"

namespace fastif {
namespace {

constexpr int kSmallestThreads = 256;

// Bits of floating-point numbers that are not negative are in the order of the numbers.
template <class Key>
using KeyBits = std::conditional_t<sizeof(Key) == 4, uint32_t, uint64_t>;

template <class KeyOf, class Bits>
__global__ void __launch_bounds__(kSmallestThreads)
    number_keys(KeyOf key_of, int64_t count, Bits* keys, uint32_t* rows) {
  const int64_t stride = int64_t(gridDim.x) * kSmallestThreads;
  for (int64_t i = int64_t(blockIdx.x) * kSmallestThreads + threadIdx.x; i < count; i += stride) {
    keys[i] = std::bit_cast<Bits>(key_of(i));
    rows[i] = uint32_t(i);
  }
}

// index[cluster, place], and sqdist where it is asked for.
template <class A>
__global__ void __launch_bounds__(kSmallestThreads)
    take_smallest(DeviceClusters clusters, int64_t k, const A* row_sqdist, int64_t* index,
                  A* sqdist) {
  const int64_t stride = int64_t(gridDim.x) * kSmallestThreads, count = clusters.clusters * k;
  for (int64_t i = int64_t(blockIdx.x) * kSmallestThreads + threadIdx.x; i < count; i += stride) {
    const int64_t cluster = i / k, place = i % k;
    const int64_t at = clusters.start[cluster] + place;
    const bool found = at < clusters.start[cluster + 1];
    const int64_t row = found ? int64_t(clusters.order[at]) : -1;
    index[i] = row;
    if (sqdist != nullptr) sqdist[i] = found ? row_sqdist[row] : std::numeric_limits<A>::infinity();
  }
}

}  // namespace

// Sorts all rows by key, and then by cluster. key_of(row), not negative, runs on the device.
// row_sqdist is read for `sqdist`, which may be null.
template <class A, class KeyOf>
void smallest_of_clusters_cuda(const char* op, const Gpu& gpu, const int64_t* labels, int64_t rows,
                               int64_t clusters, int64_t k, KeyOf key_of, const A* row_sqdist,
                               int64_t* index, A* sqdist) {
  using Bits = KeyBits<decltype(key_of(int64_t{}))>;
  if (clusters == 0 || k == 0) return;
  check_cluster_sizes(op, rows, clusters);
  const int64_t most = 16 * int64_t(gpu.multiprocessors);
  Pairs<Bits> pairs(gpu, rows);
  launch(op, gpu, number_keys<KeyOf, Bits>, grid_size(rows, kSmallestThreads, most),
         kSmallestThreads, 0, key_of, rows, pairs.keys, pairs.rows);
  sort_pairs(op, gpu, pairs, 8 * int(sizeof(Bits)));
  launch(op, gpu, take_smallest<A>, grid_size(clusters * k, kSmallestThreads, most),
         kSmallestThreads, 0, group_sorted_cuda(op, gpu, labels, pairs, clusters), k, row_sqdist,
         index, sqdist);
}

}  // namespace fastif
