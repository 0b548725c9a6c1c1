// exp of a whole vector, for arguments that are not positive: x - max(x).
#pragma once

#include "common/simd.h"

namespace fastif {

// Relative error below 3e-7 for x in [-87, 0]; NaN gives NaN.
FASTIF_INLINE f32x16 vexp(f32x16 x) {
  const f32x16 shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const f32x16 n = shifted - 12582912.0f;
  const f32x16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return bits_as<f32x16>(bits_as<u32x16>(p) + (bits_as<u32x16>(shifted) << 23));
}

// Relative error below 1e-15 for x in [-700, 0]; NaN gives NaN.
FASTIF_INLINE f64x8 vexp(f64x8 x) {
  const f64x8 shifted = x * 1.4426950408889634 + 6755399441055744.0;  // 1.5 * 2^52
  const f64x8 n = shifted - 6755399441055744.0;
  const f64x8 r = x - n * 0.693147180369123816490 - n * 1.90821492927058770002e-10;
  f64x8 p = r * (1.0 / 6227020800) + 1.0 / 479001600;  // the Taylor series up to r^13
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
  return bits_as<f64x8>(bits_as<u64x8>(p) + (bits_as<u64x8>(shifted) << 52));
}

}  // namespace fastif
