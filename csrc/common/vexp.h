// exp of a whole vector, for arguments that are not positive: x - max(x).
#pragma once

#include "common/simd_levels.h"

namespace fastif {

// Relative error below 3e-7 for x in [-87, 0]; NaN gives NaN.
template <class L>
FASTIF_INLINE typename L::f32 vexp_f32(typename L::f32 x) {
  using V = typename L::f32;
  using Bits = typename L::u32;
  const V shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const V n = shifted - 12582912.0f;
  const V r = x - n * 0.693359375f + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return bits_as<V>(bits_as<Bits>(p) + (bits_as<Bits>(shifted) << 23));
}

// Relative error below 1e-15 for x in [-700, 0]; NaN gives NaN.
template <class L>
FASTIF_INLINE typename L::f64 vexp_f64(typename L::f64 x) {
  using V = typename L::f64;
  using Bits = typename L::u64;
  const V shifted = x * 1.4426950408889634 + 6755399441055744.0;  // 1.5 * 2^52
  const V n = shifted - 6755399441055744.0;
  const V r = x - n * 0.693147180369123816490 - n * 1.90821492927058770002e-10;
  V p = r * (1.0 / 6227020800) + 1.0 / 479001600;  // the Taylor series up to r^13
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  return bits_as<V>(bits_as<Bits>(p) + (bits_as<Bits>(shifted) << 52));
}

}  // namespace fastif
