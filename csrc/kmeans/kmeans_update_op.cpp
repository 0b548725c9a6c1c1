#include "kmeans/kmeans_update.h"

#include <optional>
#include <tuple>

#include "common/run_on.h"
#include "kmeans/kmeans_op.h"

namespace fastif {
namespace {

std::tuple<Tensor, Tensor> kmeans_update(const Tensor& x, const Tensor& labels, int64_t n_clusters,
                                         std::optional<Tensor> weight) {
  constexpr const char* kOp = "fastif_ext::kmeans_update";
  STD_TORCH_CHECK(x.dim() == 2, kOp, ": x must be [n, d]");
  const int64_t n = x.size(0), d = x.size(1), K = n_clusters;
  const ScalarType dtype = accumulate_dtype(x);
  STD_TORCH_CHECK(
      labels.dim() == 1 && labels.size(0) == n && labels.scalar_type() == ScalarType::Long, kOp,
      ": labels must be int64 [n]");
  STD_TORCH_CHECK(K >= 0, kOp, ": n_clusters must not be negative");
  if (weight) {
    STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == n && weight->scalar_type() == dtype,
                    kOp, ": weight must be [n], in the dtype of the sums");
    weight = as_contiguous(*weight);
  }
  const Tensor rows = as_contiguous(x);
  const Tensor members = as_contiguous(labels);
  Tensor sums = new_tensor(x, {K, d}, dtype);
  Tensor counts = new_tensor(x, {K}, ScalarType::Long);
  const int64_t bad_row = dispatch_floating("kmeans_update", x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const KMeansUpdate<T> task{n,
                               d,
                               K,
                               data<T>(rows),
                               data<int64_t>(members),
                               weight ? data<A>(*weight) : nullptr,
                               mutable_data<A>(sums),
                               mutable_data<int64_t>(counts)};
    return run_on(
        x, [&](const Pool& pool) { return kmeans_update_cpu(task, pool); },
        [&](const auto& gpu) {
          kmeans_update_cuda(task, gpu);
          return int64_t{-1};
        });
  });
  STD_TORCH_CHECK(bad_row < 0, kOp, ": labels[", bad_row, "] = ", data<int64_t>(members)[bad_row],
                  " is outside [-1, ", K, "); use -1 for rows to ignore");
  return {sums, counts};
}

}  // namespace
}  // namespace fastif

FASTIF_REGISTER("kmeans_update", fastif::kmeans_update)
