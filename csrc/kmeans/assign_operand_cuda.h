// What the tensor cores multiply for rows of type T, in 32-bit words: one TF32 number for float,
// two float16 numbers for either half type. bfloat16 rows, too, become float16 when they are
// centred: its error is an eighth of bfloat16's, so that few rows stay open, at the same speed;
// where its range does not do, all rows stay open. Each function has a plain twin for the
// simulator. Only
// *_cuda.cu files include this.
#pragma once

#include <bit>
#include <cstdint>

#include "common/launch.h"
#include "common/numeric_types.h"

namespace fastif {
namespace {

using Word = uint32_t;

// kPerWord: values of T, and operands, to a word.
// shift(v): the float v rounded to T. raw(v): a value v of T as it lies in x, zero beside it.
// centre(x, m): x - m for the values of two words of x, as operands: rounded once (bfloat16 and
// TF32: after float's rounding). round(v): the operand nearest to the float v, zero beside it.
// value(w, i): the i-th operand of a word.
template <class T>
struct Operand;

template <>
struct Operand<float> {
  static constexpr int kPerWord = 1;
  __device__ static __forceinline__ float shift(float v) { return v; }
  __device__ static __forceinline__ Word raw(float v) { return __float_as_uint(v); }
  __device__ static __forceinline__ Word round(float v) {
    return (__float_as_uint(v) + 0x1000u) & 0xffffe000u;
  }
  __device__ static __forceinline__ Word centre(Word x, Word m) {
    return round(__uint_as_float(x) - __uint_as_float(m));
  }
  __device__ static __forceinline__ float value(Word w, int) { return __uint_as_float(w); }
};

// Two floats, rounded to float16.
__device__ __forceinline__ Word pack_halves(float low, float high) {
#ifdef __CUDACC__
  Word word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return Word{std::bit_cast<uint16_t>(_Float16(low))} |
         Word{std::bit_cast<uint16_t>(_Float16(high))} << 16;
#endif
}

struct HalfOperand {
  static constexpr int kPerWord = 2;
  __device__ static __forceinline__ Word round(float v) { return pack_halves(v, 0); }
  __device__ static __forceinline__ float value(Word w, int i) {
    return to_float(Half{uint16_t(w >> 16 * i)});
  }
};

template <>
struct Operand<Half> : HalfOperand {
  __device__ static __forceinline__ float shift(float v) { return value(round(v), 0); }
  __device__ static __forceinline__ Word raw(float v) { return round(v); }
  __device__ static __forceinline__ Word centre(Word x, Word m) {
#ifdef __CUDACC__
    Word difference;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(x), "r"(m));
    return difference;
#else
    Word difference = 0;
    for (int i = 0; i < 2; ++i) {
      const _Float16 once = _Float16(double(value(x, i)) - double(value(m, i)));
      difference |= Word{std::bit_cast<uint16_t>(once)} << 16 * i;
    }
    return difference;
#endif
  }
};

template <>
struct Operand<BFloat16> : HalfOperand {
  __device__ static __forceinline__ float shift(float v) {  // v finite
    const Word bits = __float_as_uint(v);
    return __uint_as_float((bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u);
  }
  __device__ static __forceinline__ Word raw(float v) { return __float_as_uint(v) >> 16; }
  __device__ static __forceinline__ Word centre(Word x, Word m) {
    return pack_halves(__uint_as_float(x << 16) - __uint_as_float(m << 16),
                       __uint_as_float(x & 0xffff0000u) - __uint_as_float(m & 0xffff0000u));
  }
};

// d += a b for a 16 x (8 words) tile a and a (8 words) x 8 tile b, over a warp. With g = lane / 4
// and t = lane % 4 a lane gives words a[0]: (row g, word t), a[1]: (g + 8, t), a[2]: (g, t + 4),
// a[3]: (g + 8, t + 4) and b[0]: (word t, column g), b[1]: (t + 4, g), and holds d[0], d[1]: row g,
// columns 2t, 2t + 1 and d[2], d[3]: row g + 8.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], Word a0, Word a1, Word a2, Word a3,
                                             Word b0, Word b1) {
#ifdef __CUDACC__
#define FASTIF_MMA(kind)                                                                \
  asm("mma.sync.aligned." kind " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                  \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, float>) {
    FASTIF_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  } else {
    FASTIF_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  }
#undef FASTIF_MMA
#else
  static Word posted[32][32][6];  // of the warps of the block
  auto& lanes = posted[threadIdx.x / kWarp];
  const int lane = int(threadIdx.x % kWarp), g = lane / 4, t = lane % 4;
  const Word mine[6] = {a0, a1, a2, a3, b0, b1};
  std::copy(mine, mine + 6, lanes[lane]);
  __syncwarp();
  for (int e = 0; e < 4; ++e) {
    for (int word = 0; word < 8; ++word) {
      const Word a = lanes[g * 4 + word % 4][e / 2 + word / 4 * 2];
      const Word b = lanes[(2 * t + e % 2) * 4 + word % 4][4 + word / 4];
      for (int i = 0; i < Operand<T>::kPerWord; ++i) {
        // The hardware does not see the lower bits of a TF32 operand.
        const Word seen = std::is_same_v<T, float> ? 0xffffe000u : 0xffffffffu;
        d[e] += Operand<T>::value(a & seen, i) * Operand<T>::value(b & seen, i);
      }
    }
  }
  __syncwarp();
#endif
}

}  // namespace
}  // namespace fastif
