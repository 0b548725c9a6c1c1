#include "kmeans/kmeans_nearest.h"

#include <algorithm>
#include <limits>

#include "kmeans/smallest.h"

namespace fastif {

template <class A>
void kmeans_nearest_cpu(const KMeansNearest<A>& task, const Pool& pool) {
  const int64_t size = task.clusters * task.k;
  std::fill(task.index, task.index + size, int64_t{-1});
  std::fill(task.sqdist, task.sqdist + size, std::numeric_limits<A>::infinity());
  smallest_of_clusters(
      task.labels, task.rows, task.clusters, task.k, pool,
      [&](int64_t row) { return task.row_sqdist[row]; },
      [&](int64_t cluster, int64_t place, int64_t row, A sqdist) {
        task.index[cluster * task.k + place] = row;
        task.sqdist[cluster * task.k + place] = sqdist;
      });
}

template void kmeans_nearest_cpu(const KMeansNearest<float>&, const Pool&);
template void kmeans_nearest_cpu(const KMeansNearest<double>&, const Pool&);

}  // namespace fastif
