#include "hvp/linear_softmax_hvp.h"

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "common/run_on.h"
#include "hvp/hvp_accumulate.h"
#include "hvp/softmax_hvp.h"

namespace fastif {
namespace {

// On torch's threads.
Tensor product(const Pool& pool, const Tensor& x, const Tensor& probs, const Tensor& v,
               const std::optional<Tensor>& weight, bool bias) {
  const Tensor rows = as_contiguous(x), p = as_contiguous(probs);
  Tensor result = torch::stable::empty_like(v);
  dispatch_floating("linear_softmax_hvp", x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    linear_softmax_hvp_cpu(
        LinearSoftmaxHvp<T>{x.size(0), x.size(1), probs.size(1), v.size(0), bias, data<T>(rows),
                            data<T>(p), data<A>(v), weight ? data<A>(*weight) : nullptr,
                            mutable_data<A>(result)},
        pool);
  });
  return result;
}

#ifdef FASTIF_CUDA
// out = a @ b. The out variant is not subject to autocast, and allocates nothing.
void gemm(const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor slice(Tensor t, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(t, dim, start, length);
}

// On a GPU: block after block on one stream, so that sums are in order. Blocks are large enough to
// fill it, and their z and u stay in its second-level cache.
template <class A>
Tensor product(const Gpu& gpu, const Tensor& x, const Tensor& probs, const Tensor& v,
               const A* weight, bool bias) {
  const int64_t n = x.size(0), d = x.size(1), C = probs.size(1), R = v.size(0), outputs = R * C;
  const int64_t columns = bias ? d + 1 : d;
  if (n == 0 || outputs == 0) return torch::stable::new_zeros(v, {R, C, columns});
  const Tensor flat = torch::stable::view(v, {outputs, columns});
  const Tensor slope_t = torch::stable::transpose(slice(flat, 1, 0, d), 0, 1);
  const Tensor offset = as_contiguous(slice(flat, 1, columns - 1, 1));

  const int64_t block = std::clamp<int64_t>((1 << 22) / outputs, 256, n > 256 ? n : 256);
  const Tensor z = torch::stable::new_empty(v, {std::min(block, n), outputs});
  const Tensor u = torch::stable::new_empty(v, {std::min(block, n), outputs});
  const Tensor term = torch::stable::new_empty(v, {outputs, d});
  const Tensor sum = torch::stable::new_zeros(v, {outputs, d});
  const Tensor bias_sum = torch::stable::new_zeros(v, {outputs});
  auto accumulate = [&](const Tensor& total, const Tensor& part, int64_t length) {
    const A* parts[] = {data<A>(part)};
    hvp_accumulate_cuda(
        HvpAccumulate<A, A>{1, length, 1, parts, &length, mutable_data<A>(total), 1.0}, gpu);
  };
  for (int64_t row = 0; row < n; row += block) {
    const int64_t rows = std::min(block, n - row);
    const Tensor part = slice(x, 0, row, rows);
    const Tensor z_part = slice(z, 0, 0, rows), u_part = slice(u, 0, 0, rows);
    gemm(z_part, part, slope_t);
    softmax_hvp_cuda(SoftmaxHvp<A>{rows, C, R, data<A>(probs) + row * C, data<A>(z_part),
                                   weight ? weight + row : nullptr, mutable_data<A>(u_part),
                                   outputs, C, bias ? data<A>(offset) : nullptr},
                     gpu);
    gemm(term, torch::stable::transpose(u_part, 0, 1), part);
    accumulate(sum, term, outputs * d);
    if (bias) {
      const int64_t over_rows[] = {0};
      accumulate(bias_sum, torch::stable::sum(u_part, over_rows), outputs);
    }
  }

  Tensor result = torch::stable::new_empty(v, {outputs, columns});
  Tensor slope_out = slice(result, 1, 0, d);
  torch::stable::copy_(slope_out, sum);
  if (bias) {
    Tensor bias_out = slice(result, 1, d, 1);
    torch::stable::copy_(bias_out, torch::stable::view(bias_sum, {outputs, 1}));
  }
  return torch::stable::view(result, {R, C, columns});
}
#endif

Tensor linear_softmax_hvp(const Tensor& x, const Tensor& probs, const Tensor& v,
                          std::optional<Tensor> weight) {
  constexpr const char* kOp = "fastif_ext::linear_softmax_hvp";
  STD_TORCH_CHECK(x.dim() == 2 && probs.dim() == 2 && x.size(0) == probs.size(0), kOp,
                  ": x must be [n, d] and probs [n, C]");
  STD_TORCH_CHECK(v.dim() == 2 || v.dim() == 3, kOp, ": v must be [C, d] or [R, C, d]");
  const int64_t C = probs.size(1), columns = v.size(v.dim() - 1);
  STD_TORCH_CHECK(v.size(v.dim() - 2) == C && (columns == x.size(1) || columns == x.size(1) + 1),
                  kOp, ": v must be [R, C, d] or, with a bias, [R, C, d + 1]");
  STD_TORCH_CHECK(x.scalar_type() == probs.scalar_type() && x.scalar_type() == v.scalar_type(), kOp,
                  ": x, probs and v must have one dtype");
  const bool wide = x.scalar_type() == ScalarType::Double;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  auto prepare = [&](const Tensor& t) { return as_contiguous(as_dtype(t, dtype)); };
  if (weight) {
    STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == x.size(0), kOp,
                    ": weight must be [n]");
    weight = prepare(*weight);
  }
  const int64_t R = v.dim() == 3 ? v.size(0) : 1;
  const Tensor batch = torch::stable::view(prepare(v), {R, C, columns});
  const bool bias = columns == x.size(1) + 1;
  const Tensor result = run_on(
      x, [&](const Pool& pool) { return product(pool, x, probs, batch, weight, bias); },
      [&](const auto& gpu) {
        auto run = [&](auto a) {
          using A = decltype(a);
          return product<A>(gpu, prepare(x), prepare(probs), batch,
                            weight ? data<A>(*weight) : nullptr, bias);
        };
        return wide ? run(double{}) : run(float{});
      });
  return v.dim() == 3 ? result : torch::stable::view(result, {C, columns});
}

}  // namespace
}  // namespace fastif

FASTIF_REGISTER("linear_softmax_hvp", fastif::linear_softmax_hvp)
