#include "kmeans/kmeans_assign.h"

#include <string>
#include <tuple>

#include "common/run_on.h"
#include "kmeans/kmeans_op.h"

namespace fastif {

std::pair<Tensor, Tensor> checked_assign(const char* op, const Tensor& x, const Tensor& centroids,
                                         bool exact) {
  const ScalarType dtype = accumulate_dtype(x);
  STD_TORCH_CHECK(x.dim() == 2 && centroids.dim() == 2 && x.size(1) == centroids.size(1),
                  "fastif_ext::", op, ": x must be [n, d] and centroids [K, d]");
  STD_TORCH_CHECK(x.device() == centroids.device(), "fastif_ext::", op,
                  ": x and centroids must be on one device");
  STD_TORCH_CHECK(centroids.size(0) >= 1, "fastif_ext::", op, ": centroids has no row");
  STD_TORCH_CHECK(centroids.scalar_type() == x.scalar_type() || centroids.scalar_type() == dtype,
                  "fastif_ext::", op,
                  ": centroids must have the dtype of x (or float32 with a half x)");
  const int64_t n = x.size(0), d = x.size(1), K = centroids.size(0);
  STD_TORCH_CHECK(std::max(d, K) < (int64_t{1} << 31) - 256, "fastif_ext::", op,
                  ": at most 2^31 - 256 columns, and as many centroids");
  const Tensor rows = as_contiguous(x);
  const Tensor centres = as_contiguous(as_dtype(centroids, dtype));
  Tensor labels = new_tensor(x, {n}, ScalarType::Long);
  Tensor sqdist = new_tensor(x, {n}, dtype);
  dispatch_floating(op, x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const KMeansAssign<T> task{n,
                               d,
                               K,
                               data<T>(rows),
                               data<A>(centres),
                               mutable_data<int64_t>(labels),
                               mutable_data<A>(sqdist),
                               exact};
    run_on(
        x, [&](const Pool& pool) { kmeans_assign_cpu(task, pool); },
        [&](const auto& gpu) { kmeans_assign_cuda(task, gpu); });
  });
  return {labels, sqdist};
}

namespace {

std::tuple<Tensor, Tensor> kmeans_assign(const Tensor& x, const Tensor& centroids,
                                         std::string precision) {
  STD_TORCH_CHECK(precision == "auto" || precision == "fp32" || precision == "tf32",
                  "fastif_ext::kmeans_assign: precision must be 'auto', 'fp32' or 'tf32', got '",
                  precision, "'");
  return checked_assign("kmeans_assign", x, centroids, precision != "tf32");
}

}  // namespace
}  // namespace fastif

FASTIF_REGISTER("kmeans_assign", fastif::kmeans_assign)
