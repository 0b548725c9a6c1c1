// Softmax statistics of one row of logits in double, to about 1e-15: what class sizes, curvature
// sizes and final keys are defined by. Lanes and order are fixed.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/simd.h"
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

template <class T>
FASTIF_INLINE f64x8 load_double(const T* p) {
  f64x8 v;
  for (int i = 0; i < 8; ++i) v[i] = to_float(p[i]);
  return v;
}
template <>
FASTIF_INLINE f64x8 load_double(const float* p) {
  float __attribute__((vector_size(32))) v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, f64x8);
}
template <>
FASTIF_INLINE f64x8 load_double(const double* p) {
  return load(p);
}
// The last `count` < 8 elements of a row, -inf after them.
template <class T>
FASTIF_INLINE f64x8 load_double(const T* p, int64_t count) {
  double lanes[8];
  for (int i = 0; i < 8; ++i)
    lanes[i] = i < count ? double(to_float(p[i])) : -std::numeric_limits<double>::infinity();
  return load(lanes);
}

// To be inlined into FASTIF_CLONES functions.
template <class T>
FASTIF_INLINE SoftmaxRow softmax_row(const T* row, int64_t classes) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const int64_t whole = classes / 8 * 8, tail = classes - whole;
  const f64x8 last = load_double(row + whole, tail);
  f64x8 maxima = last;
  for (int64_t j = 0; j < whole; j += 8) {
    const f64x8 x = load_double(row + j);
    maxima = x > maxima ? x : maxima;
  }
  const double max = max_lanes(maxima);
  f64x8 sum{}, sum_sq{};
  f64x8 at_max{};
  auto add = [&](f64x8 x) __attribute__((always_inline)) {
    f64x8 d = x - max;
    d = d < -340.0 ? f64x8{} - 340.0 : d;  // below, e^2 would not be a normal number; keeps NaN
    const f64x8 e = x == max ? f64x8{} : vexp(d);
    at_max += x == max ? f64x8{} + 1.0 : f64x8{};
    sum += e;
    sum_sq += e * e;
  };
  for (int64_t j = 0; j < whole; j += 8) add(load_double(row + j));
  if (tail > 0) add(last);
  const double others_at_max = sum_lanes(at_max) - 1;
  SoftmaxRow out{RowKind::kRegular, max, sum_lanes(sum) + others_at_max,
                 sum_lanes(sum_sq) + others_at_max};
  if (std::isnan(out.rest) || max == -kInfinity)
    out.kind = RowKind::kUndefined;
  else if (max == kInfinity)
    out.kind = RowKind::kInfinite;
  return out;
}

}  // namespace fastif
