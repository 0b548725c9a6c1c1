// Vectors of 16 floats (8 doubles), written once: the compiler lowers them to AVX-512, two AVX2,
// four SSE or four NEON registers, as the level of the enclosing FASTIF_CLONES function allows.
//
// Arithmetic and comparisons are the built-in operators; `mask ? a : b` selects per lane.
// Everything here is inlined: a vector never crosses a real call.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/numeric_types.h"

#define FASTIF_INLINE __attribute__((always_inline)) inline

namespace fastif {

using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using f64x8 = double __attribute__((vector_size(64)));
using i64x8 = int64_t __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));

// A vector of T of any size, for kernels that choose one for each instruction set (clones.h).
template <class T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class V, class T>
FASTIF_INLINE V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

// The vector type, and its number of lanes, in which elements of type T are computed on.
template <class T>
struct Simd {
  using vector = f32x16;
  static constexpr int lanes = 16;
};
template <>
struct Simd<double> {
  using vector = f64x8;
  static constexpr int lanes = 8;
};

template <class V, class T>
FASTIF_INLINE V bits_as(T x) {
  static_assert(sizeof(V) == sizeof(T));
  V y;
  std::memcpy(&y, &x, sizeof(V));
  return y;
}

FASTIF_INLINE f32x16 load(const float* p) {
  f32x16 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
FASTIF_INLINE f64x8 load(const double* p) {
  f64x8 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
FASTIF_INLINE u32x16 load_bits16(const void* p) {
  u16x16 v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, u32x16);
}
FASTIF_INLINE f32x16 load(const BFloat16* p) { return bits_as<f32x16>(load_bits16(p) << 16); }
FASTIF_INLINE f32x16 load(const Half* p) {  // to_float(Half), lane by lane
  const u32x16 h = load_bits16(p);
  const u32x16 sign = (h & 0x8000u) << 16;
  const u32x16 exponent_mantissa = h & 0x7fffu;
  const f32x16 finite = bits_as<f32x16>(exponent_mantissa << 13) * 0x1p112f;
  const u32x16 special = 0x7f800000u | ((exponent_mantissa & 0x3ffu) << 13);
  const u32x16 is_special = bits_as<u32x16>(exponent_mantissa >= 0x7c00u);
  return bits_as<f32x16>(sign | (is_special & special) | (~is_special & bits_as<u32x16>(finite)));
}

// The first `count` lanes from p, `fill` in the others; nothing past p + count is read.
template <class T>
FASTIF_INLINE typename Simd<T>::vector load_partial(const T* p, int64_t count,
                                                    accumulate_t<T> fill = 0) {
  accumulate_t<T> lanes[Simd<T>::lanes];
  for (int i = 0; i < Simd<T>::lanes; ++i) lanes[i] = i < count ? to_float(p[i]) : fill;
  return load(lanes);
}

FASTIF_INLINE void store(float* p, f32x16 v) { std::memcpy(p, &v, sizeof(v)); }
FASTIF_INLINE void store(double* p, f64x8 v) { std::memcpy(p, &v, sizeof(v)); }

template <class T, class V>
FASTIF_INLINE void store_partial(T* p, V v, int64_t count) {
  std::memcpy(p, &v, static_cast<size_t>(count) * sizeof(T));
}

// Sums and maxima over lanes, halving each time: one fixed order.
FASTIF_INLINE float sum_lanes(f32x16 v) {
  float lanes[16];
  store(lanes, v);
  for (int half = 8; half >= 1; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
FASTIF_INLINE double sum_lanes(f64x8 v) {
  double lanes[8];
  store(lanes, v);
  for (int half = 4; half >= 1; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
FASTIF_INLINE float max_lanes(f32x16 v) {
  float lanes[16];
  store(lanes, v);
  for (int half = 8; half >= 1; half /= 2)
    for (int i = 0; i < half; ++i)
      lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

FASTIF_INLINE f32x16 vmax(f32x16 a, f32x16 b) { return a > b ? a : b; }

}  // namespace fastif
