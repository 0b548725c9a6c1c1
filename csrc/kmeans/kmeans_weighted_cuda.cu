#include "kmeans/kmeans_weighted.h"

#include "kmeans/smallest_cuda.h"

namespace fastif {
namespace {

template <class A>
struct RankOf {
  uint64_t seed;
  const A* row_sqdist;
  FASTIF_HOST_DEVICE double operator()(int64_t row) const {
    return distance_rank(seed, row, double(row_sqdist[row]));
  }
};

}  // namespace

template <class A>
void kmeans_weighted_cuda(const KMeansWeighted<A>& task, const Gpu& gpu) {
  smallest_of_clusters_cuda<A>("kmeans_weighted", gpu, task.labels, task.rows, task.clusters,
                               task.k, RankOf<A>{task.seed, task.row_sqdist}, nullptr, task.index,
                               nullptr);
}

template void kmeans_weighted_cuda(const KMeansWeighted<float>&, const Gpu&);
template void kmeans_weighted_cuda(const KMeansWeighted<double>&, const Gpu&);

}  // namespace fastif
