#include "sampling/merge_samples.h"

#include <tuple>
#include <vector>

#include "sampling/sampling_op.h"

namespace fastif {
namespace {

std::tuple<Tensor, Tensor, Tensor> merge_samples(const Tensor& rows_a, const Tensor& log_keys_a,
                                                 const Tensor& log_threshold_a,
                                                 const Tensor& rows_b, const Tensor& log_keys_b,
                                                 const Tensor& log_threshold_b) {
  constexpr const char* kOp = "fastif_ext::merge_samples";
  const int64_t dims = rows_a.dim();
  STD_TORCH_CHECK(dims == 1 || dims == 2, kOp, ": rows must be [Y, k] or [m]");
  const int64_t Y = dims == 2 ? rows_a.size(0) : 1, k = rows_a.size(dims - 1);
  auto check = [&](const Tensor& t, ScalarType dtype, bool threshold) {
    STD_TORCH_CHECK(t.scalar_type() == dtype, kOp,
                    ": rows must be int64, log_keys and log_threshold float32");
    bool same = t.dim() == dims - threshold;
    for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == rows_a.size(d);
    STD_TORCH_CHECK(same, kOp, ": both samples must be [Y, k] with thresholds [Y], or [m] with []");
    return as_contiguous(t);
  };
  const Tensor ra = check(rows_a, ScalarType::Long, false);
  const Tensor ka = check(log_keys_a, ScalarType::Float, false);
  const Tensor ta = check(log_threshold_a, ScalarType::Float, true);
  const Tensor rb = check(rows_b, ScalarType::Long, false);
  const Tensor kb = check(log_keys_b, ScalarType::Float, false);
  const Tensor tb = check(log_threshold_b, ScalarType::Float, true);
  const SampleTensors out{torch::stable::empty_like(ra), torch::stable::empty_like(ka),
                          torch::stable::empty_like(ta)};
  const ConstSample a{data<int64_t>(ra), data<float>(ka), data<float>(ta)};
  const ConstSample b{data<int64_t>(rb), data<float>(kb), data<float>(tb)};
  run_on(
      ra, [&](const Pool&) { merge_samples_cpu(a, b, Y, k, out.data()); },
      [&](const auto& gpu) { merge_samples_cuda(a, b, Y, k, out.data(), gpu); });
  return {out.rows, out.log_keys, out.log_threshold};
}

}  // namespace
}  // namespace fastif

FASTIF_REGISTER("merge_samples", fastif::merge_samples)
