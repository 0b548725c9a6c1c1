#include "sampling/curvature_sizes.h"

#include "sampling/curvature_op.h"

namespace fastif {
namespace {

Tensor curvature_sizes(const Tensor& logits, std::optional<Tensor> row_scale) {
  constexpr const char* kOp = "fastif_ext::curvature_sizes";
  STD_TORCH_CHECK(logits.dim() == 2, kOp, ": logits must be [n, Y]");
  const int64_t n = logits.size(0), Y = logits.size(1);
  row_scale = check_row_scale(kOp, row_scale, n);
  const Tensor x = torch::stable::contiguous(logits);
  Tensor sizes = new_tensor(logits, {n}, ScalarType::Float);
  check_rows(
      kOp, dispatch_floating("curvature_sizes", x.scalar_type(), [&](auto t) {
        using T = decltype(t);
        return curvature_sizes_cpu(
            CurvatureSizes<T>{data<T>(x), n, Y, row_scale ? data<double>(*row_scale) : nullptr},
            mutable_data<float>(sizes), torch_pool());
      }));
  return sizes;
}

}  // namespace
}  // namespace fastif

STABLE_TORCH_LIBRARY_IMPL(fastif_ext, CPU, m) {
  m.impl("curvature_sizes", TORCH_BOX(&fastif::curvature_sizes));
}
