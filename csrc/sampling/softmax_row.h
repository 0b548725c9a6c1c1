// Softmax statistics of one row of logits in double, to about 1e-15: what class sizes, curvature
// sizes and final keys are defined by.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/simd_levels.h"
#include "common/vexp.h"

namespace fastif {

enum class RowKind {
  kRegular,
  kUndefined,  // has NaN, or is -inf throughout: its softmax does not exist
  kInfinite,   // has +inf and no NaN
};

struct SoftmaxRow {
  RowKind kind;
  double max;
  double rest;     // sum over the others of e = exp(x - max): the whole sum is 1 + rest
  double rest_sq;  // sum over the others of e^2

  double log_probability(double logit) const { return logit - max - std::log1p(rest); }
  // sum_y p_y (1 - p_y), without the cancellation of 1 - sum_y p_y^2 where one p_y is near 1.
  double curvature() const {
    const double sum = 1 + rest;
    return (rest * (1 + sum) - rest_sq) / (sum * sum);
  }
};

// Eight partial sums at every level, so that the order of additions is the same. To be inlined into
// the body of a FASTIF_LEVELS function.
template <class L, class T>
FASTIF_INLINE SoftmaxRow softmax_row(const T* row, int64_t classes) {
  using V = typename L::f64;
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr int kLanes = L::lanes / 2, kVectors = 8 / kLanes;
  const int64_t whole = classes / 8 * 8, tail = classes - whole;
  double last[8];  // what is left of the row, and -inf
  for (int i = 0; i < 8; ++i) last[i] = i < tail ? double(to_float(row[whole + i])) : -kInfinity;

  V maxima[kVectors];
  for (int v = 0; v < kVectors; ++v) maxima[v] = load_f64<L>(last + v * kLanes);
  for (int64_t j = 0; j < whole; j += 8) {
    for (int v = 0; v < kVectors; ++v) {
      const V x = load_f64<L>(row + j + v * kLanes);
      maxima[v] = x > maxima[v] ? x : maxima[v];
    }
  }
  const double max = max_f64<L::width>(maxima);

  V sum[kVectors] = {}, sum_sq[kVectors] = {}, at_max[kVectors] = {};
  auto add = [&](int v, V x) __attribute__((always_inline)) {
    V d = x - max;
    d = d < -340.0 ? V{} - 340.0 : d;  // below, e^2 would not be a normal number; keeps NaN
    const V e = x == max ? V{} : vexp_f64<L>(d);
    at_max[v] += x == max ? V{} + 1.0 : V{};
    sum[v] += e;
    sum_sq[v] += e * e;
  };
  for (int64_t j = 0; j < whole; j += 8)
    for (int v = 0; v < kVectors; ++v) add(v, load_f64<L>(row + j + v * kLanes));
  if (tail > 0)
    for (int v = 0; v < kVectors; ++v) add(v, load_f64<L>(last + v * kLanes));
  const double others_at_max = sum_f64<L::width>(at_max) - 1;
  SoftmaxRow out{RowKind::kRegular, max, sum_f64<L::width>(sum) + others_at_max,
                 sum_f64<L::width>(sum_sq) + others_at_max};
  if (std::isnan(out.rest) || max == -kInfinity)
    out.kind = RowKind::kUndefined;
  else if (max == kInfinity)
    out.kind = RowKind::kInfinite;
  return out;
}

}  // namespace fastif
