#include "kmeans/kmeans_nearest.h"

#include <tuple>

#include "common/run_on.h"
#include "kmeans/kmeans_op.h"

namespace fastif {
namespace {

std::tuple<Tensor, Tensor> kmeans_nearest(const Tensor& x, const Tensor& centroids, int64_t k) {
  STD_TORCH_CHECK(k >= 0, "fastif_ext::kmeans_nearest: k must not be negative");
  const auto [labels, row_sqdist] = checked_assign("kmeans_nearest", x, centroids);
  const int64_t K = centroids.size(0);
  Tensor index = new_tensor(x, {K, k}, ScalarType::Long);
  Tensor sqdist = new_tensor(x, {K, k}, row_sqdist.scalar_type());
  auto run = [&, &labels = labels, &row_sqdist = row_sqdist](auto a) {
    using A = decltype(a);
    const KMeansNearest<A> task{x.size(0),
                                K,
                                k,
                                data<int64_t>(labels),
                                data<A>(row_sqdist),
                                mutable_data<int64_t>(index),
                                mutable_data<A>(sqdist)};
    run_on(
        x, [&](const Pool& pool) { kmeans_nearest_cpu(task, pool); },
        [&](const auto& gpu) { kmeans_nearest_cuda(task, gpu); });
  };
  row_sqdist.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {index, sqdist};
}

}  // namespace
}  // namespace fastif

FASTIF_REGISTER("kmeans_nearest", fastif::kmeans_nearest)
