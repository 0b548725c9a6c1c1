#include "sampling/curvature_sizes.h"

#include "sampling/curvature_op.h"

namespace fastif {
namespace {

Tensor curvature_sizes(const Tensor& logits, std::optional<Tensor> row_scale) {
  constexpr const char* kOp = "fastif_ext::curvature_sizes";
  STD_TORCH_CHECK(logits.dim() == 2, kOp, ": logits must be [n, Y]");
  const int64_t n = logits.size(0), Y = logits.size(1);
  row_scale = check_row_scale(kOp, row_scale, n);
  const Tensor x = as_contiguous(logits);
  Tensor sizes = new_tensor(logits, {n}, ScalarType::Float);
  dispatch_floating("curvature_sizes", x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const CurvatureSizes<T> task{data<T>(x), n, Y, row_scale ? data<double>(*row_scale) : nullptr};
    float* out = mutable_data<float>(sizes);
    run_on(
        x, [&](const Pool& pool) { check_rows(kOp, curvature_sizes_cpu(task, out, pool)); },
        [&](const auto& gpu) { curvature_sizes_cuda(task, out, gpu); });
  });
  return sizes;
}

}  // namespace
}  // namespace fastif

FASTIF_REGISTER("curvature_sizes", fastif::curvature_sizes)
