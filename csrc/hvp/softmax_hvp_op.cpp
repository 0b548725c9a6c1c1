#include "hvp/softmax_hvp.h"

#include <optional>

#include "common/run_on.h"

namespace fastif {
namespace {

Tensor softmax_hvp(const Tensor& probs, const Tensor& z, std::optional<Tensor> weight) {
  constexpr const char* kOp = "fastif_ext::softmax_hvp";
  STD_TORCH_CHECK(probs.dim() == 2, kOp, ": probs must be [n, C]");
  const int64_t n = probs.size(0), C = probs.size(1);
  STD_TORCH_CHECK(
      (z.dim() == 2 || z.dim() == 3) && z.size(z.dim() - 2) == n && z.size(z.dim() - 1) == C, kOp,
      ": z must be [n, C] or [R, n, C]");
  STD_TORCH_CHECK(z.scalar_type() == probs.scalar_type(), kOp, ": z must have the dtype of probs");
  const int64_t R = z.dim() == 3 ? z.size(0) : 1;
  const bool wide = z.scalar_type() == ScalarType::Double;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  if (weight) {
    STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == n, kOp, ": weight must be [n]");
    weight = as_contiguous(as_dtype(*weight, dtype));
  }
  const Tensor p = as_contiguous(probs), x = as_contiguous(z);
  Tensor u = z.dim() == 3 ? new_tensor(z, {R, n, C}, dtype) : new_tensor(z, {n, C}, dtype);
  dispatch_floating("softmax_hvp", z.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    const SoftmaxHvp<T> task{
        n, C,    R, data<T>(p), data<T>(x), weight ? data<A>(*weight) : nullptr, mutable_data<A>(u),
        C, n * C};
    run_on(
        z, [&](const Pool& pool) { softmax_hvp_cpu(task, pool); },
        [&](const auto& gpu) { softmax_hvp_cuda(task, gpu); });
  });
  return u;
}

}  // namespace
}  // namespace fastif

FASTIF_REGISTER("softmax_hvp", fastif::softmax_hvp)
