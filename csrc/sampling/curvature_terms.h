// What curvature sizes are defined by, on CPUs at every SIMD level and on GPUs, bit for bit: the
// terms of a row's sums in float, whose products are kept apart (exact_math.h), and their order.
//
// Term j goes to partial sum j % 32 of its run of kTermRun classes. Partial sums are added halving:
// 0 + 16 ... 15 + 31, then 0 + 8 ... 7 + 15, and so on. The runs' sums are added in turn, in
// double. At most 13 float additions lie between a term and its run's sum.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/exact_math.h"
#include "common/host_device.h"
#include "common/numeric_types.h"
#include "sampling/softmax_stats.h"

namespace fastif {

constexpr int kTermLanes = 32;
constexpr int64_t kTermRun = 256;

// Terms are in units of 2^-32, so that no term above exp(kLeastTerm) = 2^-151 is subnormal, where
// float32 itself ends at 2^-149; smaller ones are 0. Squares up to 2^64 are far from overflow.
constexpr int kTermScale = 32;
constexpr float kLeastTerm = -105.0f;

// What one class adds to the sums of its row: exp(x - max), and its square, or, where x is the
// maximum, 1 to the count; in units of 2^-32 and 2^-64. NaN where the difference is NaN.
template <class V>
struct CurvatureTerm {
  V e, e_sq, at_max;
};
template <class V, class Bits = uint32_t>
FASTIF_HOST_DEVICE FASTIF_EXACT_INLINE CurvatureTerm<V> curvature_term(V d) {
  // 1.5 * 2^23: its sums are whole numbers. What is added to it makes the last bits those of the
  // exponent of a scaled 2^n.
  constexpr float kRound = 12582912.0f + (127 + kTermScale);
  const V shifted = exact_mul(d, 1.44269504f) + kRound;
  const V n = shifted - kRound;
  // n times the upper part of ln(2) is exact.
  const V r = (d - exact_mul(n, 0.693359375f)) + exact_mul(n, 2.12194440e-4f);
  // (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2, to 1e-7 of exp(r).
  V p = exact_mul(r, 8.312501013278961e-3f) + 4.1890330612659454e-2f;
  p = exact_mul(p, r) + 0.16667115688323975f;
  p = exact_mul(p, r) + 0.499992311000824f;
  p = exact_mul(p, exact_mul(r, r)) + r + 1.0f;
  V e = p * std::bit_cast<V>(std::bit_cast<Bits>(shifted) << 23);  // exact; keeps NaN
  e = d < kLeastTerm ? V{} : e;
  // A difference instead of one more selection: GCC merges the two, and computes the result lane by
  // lane.
  const V at_max = d == 0.0f ? V{} + 0x1p32f : V{};
  e -= at_max;
  return {e, exact_mul(e, e), at_max};
}

// sum_y p_y (1 - p_y) of a row, in double or vectors of it. Its largest class is left out of the
// sums, which spares confident rows the cancellation of 1 - sum_y p_y^2. NaN where the row has NaN
// or +inf, or is -inf throughout.
template <class V>
FASTIF_HOST_DEVICE FASTIF_EXACT_INLINE V curvature_of(V e, V e_sq, V at_max) {
  const V others = exact_mul(at_max, 0x1p-32) - 1.0;  // as large as the largest
  const V rest = exact_mul(e, 0x1p-32) + others, rest_sq = exact_mul(e_sq, 0x1p-64) + others;
  const V sum = rest + 1.0;
  return (exact_mul(rest, sum + 1.0) - rest_sq) / exact_mul(sum, sum);
}

// Why a row has no curvature.
template <class T>
FASTIF_HOST_DEVICE inline RowKind irregular_row_kind(const T* row, int64_t classes) {
  bool infinite = false;
  for (int64_t j = 0; j < classes; ++j) {
    const accumulate_t<T> x = to_float(row[j]);
    if (x != x) return RowKind::kUndefined;
    infinite |= x == std::numeric_limits<accumulate_t<T>>::infinity();
  }
  return infinite ? RowKind::kInfinite : RowKind::kUndefined;
}

}  // namespace fastif
