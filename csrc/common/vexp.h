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

}  // namespace fastif
