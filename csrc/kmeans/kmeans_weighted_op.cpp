#include "kmeans/kmeans_weighted.h"

#include "common/run_on.h"
#include "kmeans/kmeans_op.h"

namespace fastif {
namespace {

Tensor kmeans_weighted(const Tensor& x, const Tensor& centroids, int64_t k, int64_t seed) {
  STD_TORCH_CHECK(k >= 0, "fastif_ext::kmeans_weighted: k must not be negative");
  const auto [labels, row_sqdist] = checked_assign("kmeans_weighted", x, centroids);
  const int64_t K = centroids.size(0);
  Tensor index = new_tensor(x, {K, k}, ScalarType::Long);
  auto run = [&, &labels = labels, &row_sqdist = row_sqdist](auto a) {
    using A = decltype(a);
    const KMeansWeighted<A> task{x.size(0),
                                 K,
                                 k,
                                 static_cast<uint64_t>(seed),
                                 data<int64_t>(labels),
                                 data<A>(row_sqdist),
                                 mutable_data<int64_t>(index)};
    run_on(
        x, [&](const Pool& pool) { kmeans_weighted_cpu(task, pool); },
        [&](const auto& gpu) { kmeans_weighted_cuda(task, gpu); });
  };
  row_sqdist.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return index;
}

}  // namespace
}  // namespace fastif

FASTIF_REGISTER("kmeans_weighted", fastif::kmeans_weighted)
