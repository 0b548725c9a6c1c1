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
  dispatch_floating("bottom_k", weights.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Weights<T> w{data<T>(weights), R, n, weights.stride(0), weights.stride(1)};
    run_on(
        weights,
        [&](const Pool& pool) {
          const int64_t invalid = bottom_k_cpu(w, draw, out.data(), pool);
          STD_TORCH_CHECK(invalid < 0, kOp, ": weights must be finite and not negative; line ",
                          invalid / std::max<int64_t>(n, 1), ", position ",
                          invalid % std::max<int64_t>(n, 1), " is not");
          for (int64_t r = 0; require_k && k > 0 && r < R; ++r)
            STD_TORCH_CHECK(out.data().rows[(r + 1) * k - 1] >= 0, kOp, ": line ", r,
                            " of weights has fewer positive weights than the ", k,
                            " draws asked for");
        },
        [&](const auto& gpu) { bottom_k_cuda(w, draw, out.data(), gpu); });
  });
  return {out.rows, out.log_keys, out.log_threshold};
}

}  // namespace
}  // namespace fastif

FASTIF_REGISTER("bottom_k", fastif::bottom_k)
