#include "hvp/lissa_update.h"

#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/torch_op.h"

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
  STD_TORCH_CHECK(!hvp.empty(), kOp, ": hvp is an empty list");
  STD_TORCH_CHECK(scale > 0, kOp, ": scale must be positive, got ", scale);
  std::vector<int64_t> lengths;
  int64_t total = 0;
  for (auto& product : hvp) {
    STD_TORCH_CHECK(product.dim() >= 1 && product.size(0) == R, kOp,
                    ": every tensor of hvp must be [R, *parameter shape]");
    STD_TORCH_CHECK(product.scalar_type() == hvp[0].scalar_type(), kOp,
                    ": the tensors of hvp must have one dtype");
    int64_t length = 1;
    for (int64_t d = 1; d < product.dim(); ++d) length *= product.size(d);
    lengths.push_back(length);
    total += length;
    product = torch::stable::contiguous(product);
  }
  STD_TORCH_CHECK(total == p, kOp, ": hvp has ", total, " elements per right-hand side, h has ", p);
  if (mask) {
    STD_TORCH_CHECK(
        mask->scalar_type() == ScalarType::Bool && mask->dim() == 1 && mask->size(0) == p, kOp,
        ": mask must be a bool tensor of length p");
    mask = torch::stable::contiguous(*mask);
  }
  const Tensor v_contiguous = torch::stable::contiguous(v);
  Tensor delta_sq = new_tensor(h, {R}, ScalarType::Double);
  Tensor norm_sq = new_tensor(h, {R}, ScalarType::Double);
  Tensor finite = new_tensor(h, {R}, ScalarType::Bool);

  auto run = [&](auto t, auto g) {
    using T = decltype(t);
    using G = decltype(g);
    std::vector<const G*> pointers;
    for (const auto& product : hvp) pointers.push_back(data<G>(product));
    lissa_update_cpu(LissaUpdate<T, G>{R, p, int64_t(hvp.size()), pointers.data(), lengths.data(),
                                       mutable_data<T>(h), data<T>(v_contiguous),
                                       mask ? data<bool>(*mask) : nullptr, damping, scale,
                                       mutable_data<double>(delta_sq),
                                       mutable_data<double>(norm_sq), mutable_data<bool>(finite)},
                     torch_pool());
  };
  const ScalarType state = h.scalar_type(), product = hvp[0].scalar_type();
  if (state == ScalarType::Double && product == ScalarType::Double) {
    run(double{}, double{});
  } else if (state == ScalarType::Float && product == ScalarType::Float) {
    run(float{}, float{});
  } else if (state == ScalarType::Float && product == ScalarType::Half) {
    run(float{}, Half{});
  } else if (state == ScalarType::Float && product == ScalarType::BFloat16) {
    run(float{}, BFloat16{});
  } else {
    STD_TORCH_CHECK(false, kOp,
                    ": h must be float32 or float64, and hvp of the same dtype, or "
                    "float16/bfloat16 with a float32 h");
  }
  return {delta_sq, norm_sq, finite};
}

}  // namespace
}  // namespace fastif

STABLE_TORCH_LIBRARY_IMPL(fastif_ext, CPU, m) {
  m.impl("lissa_update_", TORCH_BOX(&fastif::lissa_update));
}
