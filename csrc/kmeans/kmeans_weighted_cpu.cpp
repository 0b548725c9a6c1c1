#include "kmeans/kmeans_weighted.h"

#include <algorithm>

#include "kmeans/smallest.h"

namespace fastif {

template <class A>
void kmeans_weighted_cpu(const KMeansWeighted<A>& task, const Pool& pool) {
  std::fill(task.index, task.index + task.clusters * task.k, int64_t{-1});
  smallest_of_clusters(
      task.labels, task.rows, task.clusters, task.k, pool,
      [&](int64_t row) { return distance_rank(task.seed, row, double(task.row_sqdist[row])); },
      [&](int64_t cluster, int64_t place, int64_t row, double) {
        task.index[cluster * task.k + place] = row;
      });
}

template void kmeans_weighted_cpu(const KMeansWeighted<float>&, const Pool&);
template void kmeans_weighted_cpu(const KMeansWeighted<double>&, const Pool&);

}  // namespace fastif
