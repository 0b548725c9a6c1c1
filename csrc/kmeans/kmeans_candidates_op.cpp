#include "kmeans/kmeans_candidates.h"

#include <optional>
#include <tuple>

#include "common/run_on.h"
#include "kmeans/kmeans_op.h"

namespace fastif {
namespace {

std::tuple<Tensor, Tensor> kmeans_candidates(const Tensor& x, const Tensor& candidates,
                                             const Tensor& sqdist, std::optional<Tensor> weight) {
  constexpr const char* kOp = "fastif_ext::kmeans_candidates";
  const ScalarType dtype = accumulate_dtype(x);
  STD_TORCH_CHECK(x.dim() == 2 && candidates.dim() == 2 && x.size(1) == candidates.size(1), kOp,
                  ": x must be [n, d] and candidates [L, d]");
  STD_TORCH_CHECK(candidates.scalar_type() == x.scalar_type() || candidates.scalar_type() == dtype,
                  kOp, ": candidates must have the dtype of x (or float32 with a half x)");
  const int64_t n = x.size(0), d = x.size(1), L = candidates.size(0);
  auto check_row_values = [&](const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n && t.scalar_type() == dtype, kOp, ": ", name,
                    " must be [n], in the dtype of the distances");
  };
  check_row_values("sqdist", sqdist);
  if (weight) {
    check_row_values("weight", *weight);
    weight = as_contiguous(*weight);
  }
  const Tensor rows = as_contiguous(x);
  const Tensor centres = as_contiguous(as_dtype(candidates, dtype));
  const Tensor nearest = as_contiguous(sqdist);
  Tensor least = new_tensor(x, {L, n}, dtype);
  Tensor potential = new_tensor(x, {L}, ScalarType::Double);
  dispatch_floating("kmeans_candidates", x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const KMeansCandidates<T> task{n,
                                   d,
                                   L,
                                   data<T>(rows),
                                   data<A>(centres),
                                   data<A>(nearest),
                                   weight ? data<A>(*weight) : nullptr,
                                   mutable_data<A>(least),
                                   mutable_data<double>(potential)};
    run_on(
        x, [&](const Pool& pool) { kmeans_candidates_cpu(task, pool); },
        [&](const auto& gpu) { kmeans_candidates_cuda(task, gpu); });
  });
  return {least, potential};
}

}  // namespace
}  // namespace fastif

FASTIF_REGISTER("kmeans_candidates", fastif::kmeans_candidates)
