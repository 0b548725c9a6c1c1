#include "hvp/lissa_update.h"

#include <optional>
#include <tuple>
#include <vector>

#include "common/run_on.h"
#include "hvp/parameter_list.h"

namespace fastif {
namespace {

std::tuple<Tensor, Tensor, Tensor> lissa_update(Tensor h, const Tensor& v, std::vector<Tensor> hvp,
                                                double damping, double scale,
                                                std::optional<Tensor> mask) {
  constexpr const char* kOp = "fastif_ext::lissa_update_";
  STD_TORCH_CHECK(h.dim() == 2 && h.is_contiguous(), kOp, ": h must be a contiguous [R, p] tensor");
  const int64_t R = h.size(0), p = h.size(1);
  STD_TORCH_CHECK(v.dim() == 2 && v.size(0) == R && v.size(1) == p, kOp,
                  ": v must have the shape of h");
  STD_TORCH_CHECK(v.scalar_type() == h.scalar_type(), kOp, ": v must have the dtype of h");
  STD_TORCH_CHECK(scale > 0, kOp, ": scale must be positive, got ", scale);
  const ParameterList list(kOp, hvp, R, p);
  if (mask) {
    STD_TORCH_CHECK(
        mask->scalar_type() == ScalarType::Bool && mask->dim() == 1 && mask->size(0) == p, kOp,
        ": mask must be a bool tensor of length p");
    mask = as_contiguous(*mask);
  }
  const Tensor v_contiguous = as_contiguous(v);
  Tensor delta_sq = new_tensor(h, {R}, ScalarType::Double);
  Tensor norm_sq = new_tensor(h, {R}, ScalarType::Double);
  Tensor finite = new_tensor(h, {R}, ScalarType::Bool);

  dispatch_state(kOp, h.scalar_type(), list.tensors[0].scalar_type(), [&](auto t, auto g) {
    using T = decltype(t);
    using G = decltype(g);
    const auto pointers = list.pointers<G>();
    const LissaUpdate<T, G> task{R,
                                 p,
                                 int64_t(pointers.size()),
                                 pointers.data(),
                                 list.lengths.data(),
                                 mutable_data<T>(h),
                                 data<T>(v_contiguous),
                                 mask ? data<bool>(*mask) : nullptr,
                                 damping,
                                 scale,
                                 mutable_data<double>(delta_sq),
                                 mutable_data<double>(norm_sq),
                                 mutable_data<bool>(finite)};
    run_on(
        h, [&](const Pool& pool) { lissa_update_cpu(task, pool); },
        [&](const auto& gpu) { lissa_update_cuda(task, gpu); });
  });
  return {delta_sq, norm_sq, finite};
}

}  // namespace
}  // namespace fastif

FASTIF_REGISTER("lissa_update_", fastif::lissa_update)
