#include "sampling/curvature_multinomial.h"

#include <cmath>
#include <tuple>

#include "sampling/curvature_op.h"

namespace fastif {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> curvature_multinomial(const Tensor& logits, int64_t m,
                                                                 int64_t seed, int64_t row_offset,
                                                                 std::optional<Tensor> row_scale,
                                                                 double floor) {
  constexpr const char* kOp = "fastif_ext::curvature_multinomial";
  STD_TORCH_CHECK(logits.dim() == 2, kOp, ": logits must be [n, Y]");
  STD_TORCH_CHECK(floor >= 0 && std::isfinite(float(floor)), kOp,
                  ": floor must be finite and not negative, got ", floor);
  const int64_t n = logits.size(0), Y = logits.size(1);
  const Draw draw = make_draw(kOp, n, 1, m, false, seed, row_offset);
  row_scale = check_row_scale(kOp, row_scale, n);
  const Tensor x = as_contiguous(logits);
  const SampleTensors out{new_tensor(logits, {m}, ScalarType::Long),
                          new_tensor(logits, {m}, ScalarType::Float),
                          new_tensor(logits, {}, ScalarType::Float)};
  Tensor skipped = new_tensor(logits, {1}, ScalarType::Long);
  dispatch_floating("curvature_multinomial", x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const CurvatureSizes<T> task{data<T>(x), n, Y, row_scale ? data<double>(*row_scale) : nullptr};
    int64_t* count = mutable_data<int64_t>(skipped);
    run_on(
        x,
        [&](const Pool& pool) {
          check_rows(kOp,
                     curvature_multinomial_cpu(task, float(floor), draw, out.data(), count, pool));
        },
        [&](const auto& gpu) {
          curvature_multinomial_cuda(task, float(floor), draw, out.data(), count, gpu);
        });
  });
  return {out.rows, out.log_keys, out.log_threshold, skipped};
}

}  // namespace
}  // namespace fastif

FASTIF_REGISTER("curvature_multinomial", fastif::curvature_multinomial)
