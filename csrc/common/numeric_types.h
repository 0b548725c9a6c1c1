// Storage types of half-precision tensors. Arithmetic is always done in float or double.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/host_device.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace fastif {

struct Half {  // IEEE binary16, torch.float16
  uint16_t bits;
};

struct BFloat16 {  // the upper half of a float, torch.bfloat16
  uint16_t bits;
};

FASTIF_HOST_DEVICE inline float to_float(float x) { return x; }
FASTIF_HOST_DEVICE inline double to_float(double x) { return x; }
FASTIF_HOST_DEVICE inline float to_float(BFloat16 x) {
  return std::bit_cast<float>(uint32_t{x.bits} << 16);
}
FASTIF_HOST_DEVICE inline float to_float(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t exponent_mantissa = x.bits & 0x7fffu;
  if (exponent_mantissa >= 0x7c00u) {  // inf and NaN
    return std::bit_cast<float>(sign | 0x7f800000u | ((exponent_mantissa & 0x3ffu) << 13));
  }
  // Moved up by 13 bits the exponent is 112 too small; the product also normalises denormals.
  const float magnitude = std::bit_cast<float>(exponent_mantissa << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
#endif
}

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
// The type in which a kernel computes on elements of type T: float, or double for double.
template <class T>
using accumulate_t = typename Accumulate<T>::type;

}  // namespace fastif
