#include "kmeans/kmeans_nearest.h"

#include "common/host_device.h"
#include "kmeans/smallest_cuda.h"

namespace fastif {
namespace {

template <class A>
struct SqdistOf {
  const A* row_sqdist;
  FASTIF_HOST_DEVICE A operator()(int64_t row) const { return row_sqdist[row]; }
};

}  // namespace

template <class A>
void kmeans_nearest_cuda(const KMeansNearest<A>& task, const Gpu& gpu) {
  smallest_of_clusters_cuda("kmeans_nearest", gpu, task.labels, task.rows, task.clusters, task.k,
                            SqdistOf<A>{task.row_sqdist}, task.row_sqdist, task.index, task.sqdist);
}

template void kmeans_nearest_cuda(const KMeansNearest<float>&, const Gpu&);
template void kmeans_nearest_cuda(const KMeansNearest<double>&, const Gpu&);

}  // namespace fastif
