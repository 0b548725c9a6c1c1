// Rows grouped by label on a GPU: clusters.h there. Only *_cuda.cu files include this.
#pragma once

#include <cstdint>

#include "common/device_sort.h"

namespace fastif {

// The rows of cluster j are order[start[j]] ... order[start[j + 1] - 1]; rows with label -1 come
// before all others.
struct DeviceClusters {
  int64_t rows, clusters;
  const uint32_t* start;  // [clusters + 1]
  const uint32_t* order;  // [rows]
  const unsigned* bad;    // 1 if some label is not in [-1, clusters); its row is in no cluster
};

// Refuses what 32-bit row numbers cannot count.
void check_cluster_sizes(const char* op, int64_t rows, int64_t clusters);

// Rows in ascending order within each cluster.
DeviceClusters group_rows_cuda(const char* op, const Gpu& gpu, const int64_t* labels, int64_t rows,
                               int64_t clusters);

// Rows of each cluster in the order in which `sorted` has them; its memory is used up.
template <class Key>
DeviceClusters group_sorted_cuda(const char* op, const Gpu& gpu, const int64_t* labels,
                                 const Pairs<Key>& sorted, int64_t clusters);

}  // namespace fastif
