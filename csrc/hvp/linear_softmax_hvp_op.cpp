#include "hvp/linear_softmax_hvp.h"

#include <array>
#include <optional>
#include <vector>

#include "common/torch_op.h"
#include "hvp/softmax_hvp.h"

namespace fastif {
namespace {

// out = a @ b. The out variant is not subject to autocast, and allocates nothing.
void gemm(const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

template <class A>
void add(A* sum, const A* terms, int64_t length) {
  for (int64_t i = 0; i < length; ++i) sum[i] += terms[i];
}

Tensor narrow(Tensor t, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(t, dim, start, length);
}

template <class A>
Tensor product(const Tensor& x, const Tensor& probs, const Tensor& v, const A* weight, bool bias) {
  const int64_t n = x.size(0), d = x.size(1), C = probs.size(1), R = v.size(0), outputs = R * C;
  const int64_t columns = bias ? d + 1 : d;
  Tensor result = torch::stable::new_zeros(v, {R, C, columns});
  if (n == 0 || outputs == 0) return result;
  const Tensor flat = torch::stable::view(v, {outputs, columns});
  const Tensor slope = narrow(flat, 1, 0, d);
  const Tensor slope_t = torch::stable::transpose(slope, 0, 1);
  std::vector<A> offset(bias ? outputs : 0);
  for (int64_t o = 0; o < int64_t(offset.size()); ++o) offset[o] = data<A>(flat)[o * columns + d];

  const LinearSoftmaxPlan plan = plan_linear_softmax(n, d, outputs);
  const int64_t blocks = ceil_div(n, plan.rows);
  const Tensor sums = torch::stable::new_zeros(v, {plan.groups, outputs, d});
  std::vector<A> bias_sums(bias ? plan.groups * outputs : 0, A(0));
  parallel_tasks(torch_pool(), plan.groups, [&](int64_t group) {
    const Tensor z = torch::stable::new_empty(v, {plan.rows, outputs});
    const Tensor u = torch::stable::new_empty(v, {plan.rows, outputs});
    const Tensor term = torch::stable::new_empty(v, {outputs, d});
    const Tensor sum = torch::stable::select(sums, 0, group);
    const int64_t first = blocks * group / plan.groups, last = blocks * (group + 1) / plan.groups;
    for (int64_t block = first; block < last; ++block) {
      const int64_t row = block * plan.rows, rows = std::min(plan.rows, n - row);
      const Tensor part = narrow(x, 0, row, rows);
      Tensor z_part = narrow(z, 0, 0, rows);
      const Tensor u_part = narrow(u, 0, 0, rows);
      A* tangents = mutable_data<A>(z_part);
      gemm(z_part, part, slope_t);
      for (int64_t i = 0; bias && i < rows; ++i)
        add(tangents + i * outputs, offset.data(), outputs);
      softmax_hvp_rows(
          SoftmaxHvp<A>{rows, C, R, data<A>(probs) + row * C, tangents,
                        weight ? weight + row : nullptr, mutable_data<A>(u_part), outputs, C},
          0, rows);
      gemm(term, torch::stable::transpose(u_part, 0, 1), part);
      add(mutable_data<A>(sum), data<A>(term), outputs * d);
      A* bias_sum = bias_sums.data() + group * outputs;
      for (int64_t i = 0; bias && i < rows; ++i)
        add(bias_sum, data<A>(u_part) + i * outputs, outputs);
    }
  });

  A* out = mutable_data<A>(result);
  for (int64_t group = 0; group < plan.groups; ++group) {
    for (int64_t o = 0; o < outputs; ++o) {
      add(out + o * columns, data<A>(sums) + (group * outputs + o) * d, d);
      if (bias) out[o * columns + d] += bias_sums[group * outputs + o];
    }
  }
  return result;
}

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
  auto prepare = [&](const Tensor& t) {
    return torch::stable::contiguous(torch::stable::to(t, dtype));
  };
  if (weight) {
    STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == x.size(0), kOp,
                    ": weight must be [n]");
    weight = prepare(*weight);
  }
  const int64_t R = v.dim() == 3 ? v.size(0) : 1;
  const Tensor batch = torch::stable::view(prepare(v), {R, C, columns});
  const bool bias = columns == x.size(1) + 1;
  Tensor result = wide ? product<double>(prepare(x), prepare(probs), batch,
                                         weight ? data<double>(*weight) : nullptr, bias)
                       : product<float>(prepare(x), prepare(probs), batch,
                                        weight ? data<float>(*weight) : nullptr, bias);
  return v.dim() == 3 ? result : torch::stable::view(result, {C, columns});
}

}  // namespace
}  // namespace fastif

STABLE_TORCH_LIBRARY_IMPL(fastif_ext, CPU, m) {
  m.impl("linear_softmax_hvp", TORCH_BOX(&fastif::linear_softmax_hvp));
}
