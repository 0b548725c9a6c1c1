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
  const Tensor x = as_contiguous(logits);
  const SampleTensors out{new_tensor(logits, {Y, k}, ScalarType::Long),
                          new_tensor(logits, {Y, k}, ScalarType::Float),
                          new_tensor(logits, {Y}, ScalarType::Float)};
  Tensor skipped = new_tensor(logits, {1}, ScalarType::Long);
  dispatch_floating("class_multinomial", x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    int64_t* count = mutable_data<int64_t>(skipped);
    run_on(
        x,
        [&](const Pool& pool) {
          const int64_t bad = class_multinomial_cpu(data<T>(x), n, draw, out.data(), count, pool);
          STD_TORCH_CHECK(bad < 0, kOp, ": logits has +inf in row ", bad,
                          "; clamp the logits or repair the model that made them");
        },
        [&](const auto& gpu) {
          class_multinomial_cuda(data<T>(x), n, draw, out.data(), count, gpu);
        });
  });
  return {out.rows, out.log_keys, out.log_threshold, skipped};
}

}  // namespace
}  // namespace fastif

FASTIF_REGISTER("class_multinomial", fastif::class_multinomial)
