#include "sampling/class_multinomial.h"

#include <tuple>

#include "sampling/sampling_op.h"

namespace fastif {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> class_multinomial(const Tensor& logits, int64_t k,
                                                             bool replacement, int64_t seed,
                                                             int64_t row_offset) {
  constexpr const char* kOp = "fastif_ext::class_multinomial";
  STD_TORCH_CHECK(logits.dim() == 2, kOp, ": logits must be [n, Y]");
  const int64_t n = logits.size(0), Y = logits.size(1);
  const Draw draw = make_draw(kOp, n, Y, k, replacement, seed, row_offset);
  const Tensor x = torch::stable::contiguous(logits);
  const SampleTensors out{new_tensor(logits, {Y, k}, ScalarType::Long),
                          new_tensor(logits, {Y, k}, ScalarType::Float),
                          new_tensor(logits, {Y}, ScalarType::Float)};
  Tensor skipped = zero_count(logits);
  const int64_t infinite = dispatch_floating("class_multinomial", x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    return class_multinomial_cpu(data<T>(x), n, draw, out.data(), mutable_data<int64_t>(skipped),
                                 torch_pool());
  });
  STD_TORCH_CHECK(infinite < 0, kOp, ": logits has +inf in row ", infinite,
                  "; clamp the logits or repair the model that made them");
  return {out.rows, out.log_keys, out.log_threshold, skipped};
}

}  // namespace
}  // namespace fastif

STABLE_TORCH_LIBRARY_IMPL(fastif_ext, CPU, m) {
  m.impl("class_multinomial", TORCH_BOX(&fastif::class_multinomial));
}
