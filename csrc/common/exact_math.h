// log, log1p and exp whose every operation is rounded by itself, so that CPUs at every SIMD level
// and GPUs compute the same bits: what decides which rows are drawn.
//
// Sums, differences and quotients are rounded alike everywhere. But compilers fuse a
// product with the sum it goes into, on some machines and not on others, so every product here goes
// through exact_mul, which keeps it apart. The algorithms of log and log1p are those of Sun's
// fdlibm, with errors below 1 ulp; exp is within 1.5 ulp.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/host_device.h"

#define FASTIF_EXACT_INLINE __attribute__((always_inline)) inline

namespace fastif {

// a * b, rounded, of doubles, floats or vectors of them.
template <class V>
FASTIF_HOST_DEVICE FASTIF_EXACT_INLINE V exact_mul(V a, V b) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<V, float>) {
    return __fmul_rn(a, b);
  } else {
    return __dmul_rn(a, b);
  }
#else
  V product = a * b;
#if defined(__x86_64__)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#else
  volatile V kept = product;
  product = kept;
#endif
  return product;
#endif
}
template <class V, class Scalar>
FASTIF_HOST_DEVICE FASTIF_EXACT_INLINE V exact_mul(V a, Scalar b)
  requires(std::is_floating_point_v<Scalar> && !std::is_floating_point_v<V>)
{
  return exact_mul(a, V{} + b);
}

namespace exact {

constexpr double kLn2High = 6.93147180369123816490e-01;  // 33 bits: its products with small
constexpr double kLn2Low = 1.90821492927058770002e-10;   // integers are exact

// log(2^k (1 + f)) + c for 1 + f in [sqrt(1/2), sqrt(2)].
FASTIF_HOST_DEVICE inline double log_reduced(int k, double f, double c) {
  const double half_square = exact_mul(exact_mul(0.5, f), f);
  const double s = f / (2.0 + f);
  const double z = exact_mul(s, s), w = exact_mul(z, z);
  double odd = 1.531383769920937332e-01;
  odd = 2.222219843214978396e-01 + exact_mul(w, odd);
  odd = 3.999999999940941908e-01 + exact_mul(w, odd);
  double even = 1.479819860511658591e-01;
  even = 1.818357216161805012e-01 + exact_mul(w, even);
  even = 2.857142874366239149e-01 + exact_mul(w, even);
  even = 6.666666666666735130e-01 + exact_mul(w, even);
  const double rest = exact_mul(z, even) + exact_mul(w, odd);
  const double low = exact_mul(s, half_square + rest) + (exact_mul(double(k), kLn2Low) + c);
  return low - half_square + f + exact_mul(double(k), kLn2High);
}

// Splits a positive normal x into 2^k (1 + f), 1 + f in [sqrt(1/2), sqrt(2)].
FASTIF_HOST_DEVICE inline int split(double x, double* f) {
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  const uint32_t high = uint32_t(bits >> 32) + (0x3ff00000u - 0x3fe6a09eu);
  const uint32_t fraction = (high & 0x000fffffu) + 0x3fe6a09eu;
  *f = std::bit_cast<double>(uint64_t{fraction} << 32 | (bits & 0xffffffffu)) - 1.0;
  return int(high >> 20) - 0x3ff;
}

}  // namespace exact

// -inf at 0, NaN below it.
FASTIF_HOST_DEVICE inline double exact_log(double x) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (!(x > 0)) return x == 0 ? -kInfinity : std::numeric_limits<double>::quiet_NaN();
  if (x == kInfinity) return x;
  const bool small = x < std::numeric_limits<double>::min();
  double f;
  const int k = exact::split(small ? exact_mul(x, 0x1p54) : x, &f) - (small ? 54 : 0);
  return exact::log_reduced(k, f, 0);
}

// log(1 + x) without its cancellation; -inf at -1, NaN below it.
FASTIF_HOST_DEVICE inline double exact_log1p(double x) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (!(x > -1)) return x == -1 ? -kInfinity : std::numeric_limits<double>::quiet_NaN();
  if (x == kInfinity) return x;
  if (x < 0x1p-53 && x > -0x1p-53) return x;
  if (x > -0.29 && x < 0.41) return exact::log_reduced(0, x, 0);
  double f;
  const double sum = 1.0 + x;
  const int k = exact::split(sum, &f);
  // What the sum has lost of the smaller term.
  const double lost = k >= 2 ? 1.0 - (sum - x) : x - (sum - 1.0);
  return exact::log_reduced(k, f, k < 54 ? lost / sum : 0.0);
}

// For doubles or vectors of them, x in [-700, 700]; NaN gives NaN.
template <class V, class Bits = uint64_t>
FASTIF_HOST_DEVICE FASTIF_EXACT_INLINE V exact_exp(V x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: its sums are whole numbers
  const V shifted = exact_mul(x, 1.4426950408889634) + kRound;
  const V n = shifted - kRound;
  const V r = x - exact_mul(n, exact::kLn2High) - exact_mul(n, exact::kLn2Low);
  // (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2, to 2^-55 of exp(r).
  V p = exact_mul(r, 2.5100388772450645e-08) + 2.7620092706650667e-07;
  p = exact_mul(p, r) + 2.7557268453107527e-06;
  p = exact_mul(p, r) + 2.480152128699544e-05;
  p = exact_mul(p, r) + 0.00019841269863058052;
  p = exact_mul(p, r) + 0.0013888888917219482;
  p = exact_mul(p, r) + 0.008333333333330062;
  p = exact_mul(p, r) + 0.041666666666624115;
  p = exact_mul(p, r) + 0.16666666666666669;
  p = exact_mul(p, r) + 0.5000000000000001;
  p = exact_mul(p, exact_mul(r, r)) + r + 1.0;
  return std::bit_cast<V>(std::bit_cast<Bits>(p) + (std::bit_cast<Bits>(shifted) << 52));
}

}  // namespace fastif
