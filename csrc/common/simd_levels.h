// Kernels written once for the vector width of each machine level: 64 bytes with AVX-512, 32 with
// AVX2, 16 with SSE2, NEON and elsewhere.
//
// Vectors wider than the machine's (simd.h on AVX2) are right but slow where lanes are compared or
// selected: GCC lowers these lane by lane. So kernels that live on them are templates over a Level,
// and FASTIF_LEVELS makes a function of one, which picks the level at run time.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/clones.h"
#include "common/numeric_types.h"
#include "common/simd.h"

namespace fastif {

template <int bytes>
struct Level {
  typedef float f32 __attribute__((vector_size(bytes)));
  typedef int32_t i32 __attribute__((vector_size(bytes)));
  typedef uint32_t u32 __attribute__((vector_size(bytes)));
  typedef uint16_t u16 __attribute__((vector_size(bytes / 2)));
  typedef float half_f32 __attribute__((vector_size(bytes / 2)));
  typedef double f64 __attribute__((vector_size(bytes)));
  typedef uint64_t u64 __attribute__((vector_size(bytes)));
  static constexpr int width = bytes;
  static constexpr int lanes = bytes / 4;
};
using LevelV4 = Level<64>;
using LevelV3 = Level<32>;
using LevelBase = Level<16>;

// The vector at p, converted to float lanes.
template <class L>
FASTIF_INLINE typename L::f32 load_f32(const float* p) {
  typename L::f32 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class L>
FASTIF_INLINE typename L::u32 load_u16(const void* p) {
  typename L::u16 v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, typename L::u32);
}
template <class L>
FASTIF_INLINE typename L::f32 load_f32(const BFloat16* p) {
  return bits_as<typename L::f32>(load_u16<L>(p) << 16);
}
template <class L>
FASTIF_INLINE typename L::f32 load_f32(const Half* p) {  // to_float(Half), lane by lane
  using U = typename L::u32;
  const U h = load_u16<L>(p), sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  const U finite = bits_as<U>(bits_as<typename L::f32>(magnitude << 13) * 0x1p112f);
  const U special = 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  return bits_as<typename L::f32>(sign | (magnitude >= 0x7c00u ? special : finite));
}

// The vector at p, converted to double lanes.
template <class L>
FASTIF_INLINE typename L::f64 load_f64(const double* p) {
  typename L::f64 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class L>
FASTIF_INLINE typename L::f64 load_f64(const float* p) {
  typename L::half_f32 v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, typename L::f64);
}
template <class L, class T>
FASTIF_INLINE typename L::f64 load_f64(const T* p) {
  typename L::f64 v;
  for (int i = 0; i < L::lanes / 2; ++i) v[i] = to_float(p[i]);
  return v;
}

// The vector at p in the type that elements of type T are computed in.
template <class L, class T>
using lanes_t = std::conditional_t<sizeof(T) == 8, typename L::f64, typename L::f32>;
template <class L, class T>
FASTIF_INLINE lanes_t<L, T> load_lanes(const T* p) {
  if constexpr (sizeof(T) == 8) {
    return load_f64<L>(p);
  } else {
    return load_f32<L>(p);
  }
}

template <class V, class T>
FASTIF_INLINE void store_vector(T* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

// Lane i of the result is lane Pick::at(i) of a, then b.
template <class Pick, class V, int... i>
FASTIF_INLINE V picked(V a, V b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, Pick::at(i)...);
}
template <class Pick, class V>
FASTIF_INLINE V picked(V a, V b) {
  return picked<Pick>(a, b, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>{});
}

// One vector of half the width from each half of v, combined, down to 16 bytes.
template <class Narrow, class V, class Op>
FASTIF_INLINE Narrow fold_halves(V v, Op op) {
  Narrow parts[2];
  static_assert(sizeof(parts) == sizeof(v));
  std::memcpy(parts, &v, sizeof(v));
  return op(parts[0], parts[1]);
}

// Sum and maximum over lanes, halving each time: one fixed order.
template <int bytes>
FASTIF_INLINE float sum_f32(typename Level<bytes>::f32 v) {
  if constexpr (bytes == 16) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    using Narrow = typename Level<bytes / 2>::f32;
    return sum_f32<bytes / 2>(fold_halves<Narrow>(v, [](Narrow a, Narrow b) { return a + b; }));
  }
}
template <int bytes>
FASTIF_INLINE float max_f32(typename Level<bytes>::f32 v) {
  if constexpr (bytes == 16) {
    const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
  } else {
    using Narrow = typename Level<bytes / 2>::f32;
    return max_f32<bytes / 2>(
        fold_halves<Narrow>(v, [](Narrow a, Narrow b) { return a > b ? a : b; }));
  }
}
// The same of eight doubles, in as many vectors as the level needs for them.
template <int bytes>
FASTIF_INLINE double sum_f64(const typename Level<bytes>::f64* v) {
  if constexpr (bytes == 64) {
    typename Level<32>::f64 parts[2];
    std::memcpy(parts, v, sizeof(parts));
    return sum_f64<32>(parts);
  } else if constexpr (bytes == 32) {
    const auto quad = v[0] + v[1];
    return (quad[0] + quad[2]) + (quad[1] + quad[3]);
  } else {
    const auto even = v[0] + v[2], odd = v[1] + v[3];
    return (even[0] + odd[0]) + (even[1] + odd[1]);
  }
}
template <int bytes>
FASTIF_INLINE double max_f64(const typename Level<bytes>::f64* v) {
  double lanes[8];
  std::memcpy(lanes, v, sizeof(lanes));
  for (int half = 4; half >= 1; half /= 2)
    for (int i = 0; i < half; ++i)
      lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

}  // namespace fastif

// Defines name(arguments...), which calls body<Level>(arguments...) compiled for this machine.
// `body` is an always-inline function template whose first parameter is the Level.
#ifdef FASTIF_X86_LEVELS
#define FASTIF_LEVELS(name, body)                         \
  template <class... A>                                   \
  FASTIF_TARGET_V4 auto name##_v4(A... a) {               \
    return body<LevelV4>(a...);                           \
  }                                                       \
  template <class... A>                                   \
  FASTIF_TARGET_V3 auto name##_v3(A... a) {               \
    return body<LevelV3>(a...);                           \
  }                                                       \
  template <class... A>                                   \
  auto name##_base(A... a) {                              \
    return body<LevelBase>(a...);                         \
  }                                                       \
  template <class... A>                                   \
  auto name(A... a) {                                     \
    const SimdLevel level = simd_level();                 \
    return level == SimdLevel::kV4   ? name##_v4(a...)    \
           : level == SimdLevel::kV3 ? name##_v3(a...)    \
                                     : name##_base(a...); \
  }
#else
#define FASTIF_LEVELS(name, body) \
  template <class... A>           \
  auto name(A... a) {             \
    return body<LevelBase>(a...); \
  }
#endif
