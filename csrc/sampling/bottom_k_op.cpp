#include "sampling/bottom_k.h"

#include <tuple>

#include "sampling/sampling_op.h"

namespace fastif {
namespace {

std::tuple<Tensor, Tensor, Tensor> bottom_k(const Tensor& weights, int64_t k, bool replacement,
                                            int64_t seed, int64_t row_offset, bool require_k) {
  constexpr const char* kOp = "fastif_ext::bottom_k";
  STD_TORCH_CHECK(weights.dim() == 2, kOp, ": weights must be [R, n]");
  const int64_t R = weights.size(0), n = weights.size(1);
  const Draw draw = make_draw(kOp, n, R, k, replacement, seed, row_offset);
  const SampleTensors out{new_tensor(weights, {R, k}, ScalarType::Long),
                          new_tensor(weights, {R, k}, ScalarType::Float),
                          new_tensor(weights, {R}, ScalarType::Float)};
  const int64_t invalid = dispatch_floating("bottom_k", weights.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Weights<T> w{data<T>(weights), R, n, weights.stride(0), weights.stride(1)};
    return bottom_k_cpu(w, draw, out.data(), torch_pool());
  });
  STD_TORCH_CHECK(invalid < 0, kOp, ": weights must be finite and not negative; line ",
                  invalid / std::max<int64_t>(n, 1), ", position ",
                  invalid % std::max<int64_t>(n, 1), " is not");
  if (require_k && k > 0) {
    for (int64_t r = 0; r < R; ++r)
      STD_TORCH_CHECK(out.data().rows[(r + 1) * k - 1] >= 0, kOp, ": line ", r,
                      " of weights has fewer positive weights than the ", k, " draws asked for");
  }
  return {out.rows, out.log_keys, out.log_threshold};
}

}  // namespace
}  // namespace fastif

STABLE_TORCH_LIBRARY_IMPL(fastif_ext, CPU, m) { m.impl("bottom_k", TORCH_BOX(&fastif::bottom_k)); }
