#include "kmeans/clusters_cuda.h"

#include <bit>

#include "common/launch.h"

namespace fastif {
namespace {

constexpr int kGroupThreads = 256;

// keys[i]: label + 1 of row rows[i], 0 for a row in no cluster.
__global__ void __launch_bounds__(kGroupThreads)
    label_keys(const int64_t* labels, int64_t count, int64_t clusters, bool number_rows,
               uint32_t* keys, uint32_t* rows, unsigned* bad) {
  const int64_t stride = int64_t(gridDim.x) * kGroupThreads;
  for (int64_t i = int64_t(blockIdx.x) * kGroupThreads + threadIdx.x; i < count; i += stride) {
    if (number_rows) rows[i] = uint32_t(i);
    const int64_t label = labels[number_rows ? i : int64_t(rows[i])];
    const bool valid = label >= -1 && label < clusters;
    if (!valid) atomicOr(bad, 1u);
    keys[i] = valid ? uint32_t(label + 1) : 0u;
  }
}

// start[j]: the number of keys up to j.
__global__ void __launch_bounds__(kGroupThreads)
    find_starts(const uint32_t* keys, int64_t count, int64_t clusters, uint32_t* start) {
  const int64_t stride = int64_t(gridDim.x) * kGroupThreads;
  for (int64_t j = int64_t(blockIdx.x) * kGroupThreads + threadIdx.x; j <= clusters; j += stride) {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (int64_t(keys[middle]) <= j)
        low = middle + 1;
      else
        high = middle;
    }
    start[j] = uint32_t(low);
  }
}

DeviceClusters group(const char* op, const Gpu& gpu, const int64_t* labels, Pairs<uint32_t>&& pairs,
                     int64_t clusters, bool number_rows) {
  const int64_t most = 16 * int64_t(gpu.multiprocessors);
  unsigned* bad = gpu.scratch<unsigned>(1);
  uint32_t* start = gpu.scratch<uint32_t>(clusters + 1);
  fill_bytes(op, gpu, bad, 0, sizeof(unsigned));
  launch(op, gpu, label_keys, grid_size(pairs.count, kGroupThreads, most), kGroupThreads, 0, labels,
         pairs.count, clusters, number_rows, pairs.keys, pairs.rows, bad);
  sort_pairs(op, gpu, pairs, int(std::bit_width(uint64_t(clusters))));
  launch(op, gpu, find_starts, grid_size(clusters + 1, kGroupThreads, most), kGroupThreads, 0,
         static_cast<const uint32_t*>(pairs.keys), pairs.count, clusters, start);
  return DeviceClusters{pairs.count, clusters, start, pairs.rows, bad};
}

}  // namespace

void check_cluster_sizes(const char* op, int64_t rows, int64_t clusters) {
  if (rows < 0xffffffff && clusters < 0xffffffff) return;
  throw std::runtime_error(std::string("fastif_ext::") + op + ": got " + std::to_string(rows) +
                           " rows and " + std::to_string(clusters) +
                           " clusters; a GPU takes fewer than 2^32 - 1 of each: pass the rows in "
                           "chunks");
}

DeviceClusters group_rows_cuda(const char* op, const Gpu& gpu, const int64_t* labels, int64_t rows,
                               int64_t clusters) {
  check_cluster_sizes(op, rows, clusters);
  return group(op, gpu, labels, Pairs<uint32_t>(gpu, rows), clusters, true);
}

template <class Key>
DeviceClusters group_sorted_cuda(const char* op, const Gpu& gpu, const int64_t* labels,
                                 const Pairs<Key>& sorted, int64_t clusters) {
  check_cluster_sizes(op, sorted.count, clusters);
  return group(op, gpu, labels, Pairs<uint32_t>(gpu, sorted), clusters, false);
}

template DeviceClusters group_sorted_cuda(const char*, const Gpu&, const int64_t*,
                                          const Pairs<uint32_t>&, int64_t);
template DeviceClusters group_sorted_cuda(const char*, const Gpu&, const int64_t*,
                                          const Pairs<uint64_t>&, int64_t);

}  // namespace fastif
