#include "sampling/gate.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>  // declares the builtins of every level
#endif

#include "common/philox.h"
#include "common/simd_levels.h"

namespace fastif {
namespace {

// The product of the lower halves of 64-bit lanes and a 32-bit constant. Spelled out in vector
// types it becomes shifts and additions (AVX2: 2.4 ns an element instead of 1.5).
template <class L>
FASTIF_INLINE typename L::u64 widening_product(typename L::u64 a, uint64_t constant) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  using I = typename L::i32;
  const I x = bits_as<I>(a), y = bits_as<I>(typename L::u64{} + constant);
  if constexpr (L::lanes == 16) {
    using Wide = long long __attribute__((vector_size(64)));
    return bits_as<typename L::u64>(__builtin_ia32_pmuludq512_mask(x, y, Wide{}, 0xff));
  } else if constexpr (L::lanes == 8) {
    return bits_as<typename L::u64>(__builtin_ia32_pmuludq256(x, y));
  } else {
    return bits_as<typename L::u64>(__builtin_ia32_pmuludq128(x, y));
  }
#else
  return (a & 0xffffffffu) * constant;
#endif
}

// The four words of L::lanes consecutive counters. Counters stand in 64-bit lanes of which only the
// lower half counts, so that no product has to be put together from two halves: even ones in `c`,
// odd ones in `d`.
template <class L>
FASTIF_INLINE void philox_lanes(uint64_t seed, uint64_t counter, typename L::u32 words[4]) {
  using V = typename L::u64;
  V even;
  for (int i = 0; i < L::lanes / 2; ++i) even[i] = uint64_t(2 * i);
  V c[4] = {counter + even, {}, {}, {}}, d[4] = {c[0] + 1, {}, {}, {}};
  c[1] = c[0] >> 32;
  d[1] = d[0] >> 32;
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const V c0 = widening_product<L>(c[0], kPhiloxMul0),
            c1 = widening_product<L>(c[2], kPhiloxMul1);
    const V d0 = widening_product<L>(d[0], kPhiloxMul0),
            d1 = widening_product<L>(d[2], kPhiloxMul1);
    c[0] = (c1 >> 32) ^ c[1] ^ uint64_t { key0 };
    d[0] = (d1 >> 32) ^ d[1] ^ uint64_t { key0 };
    c[2] = (c0 >> 32) ^ c[3] ^ uint64_t { key1 };
    d[2] = (d0 >> 32) ^ d[3] ^ uint64_t { key1 };
    c[1] = c1;
    d[1] = d1;
    c[3] = c0;
    d[3] = d0;
    key0 += kPhiloxKey0;
    key1 += kPhiloxKey1;
  }
  for (int w = 0; w < 4; ++w)
    words[w] = bits_as<typename L::u32>((c[w] & 0xffffffffu) | (d[w] << 32));
}

template <class L>
FASTIF_INLINE bool any_bit(typename L::u32 v) {
  uint64_t lanes[L::lanes / 2], any = 0;
  std::memcpy(lanes, &v, sizeof(v));
  for (uint64_t lane : lanes) any |= lane;
  return any != 0;
}

template <class L>
FASTIF_INLINE int64_t gate_blocks(uint64_t seed, uint64_t first_block, int64_t blocks,
                                  const float* bounds, const float* limits, int64_t classes,
                                  int64_t phase, uint32_t* index, uint32_t* word) {
  const int64_t step = kGateLanes % classes;
  int64_t hits = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t phases[4];
    for (int64_t& start : phases) {
      start = phase;
      phase += step;
      if (phase >= classes) phase -= classes;
    }
    // An element passes if its difference has no sign bit. (Comparisons whose result is stored
    // become scalar code.)
    uint32_t bits[kGateBlock], signs[kGateBlock];
    typename L::u32 all = ~typename L::u32{};
    for (int64_t lane = 0; lane < kGateLanes; lane += L::lanes) {
      typename L::u32 words[4];
      philox_lanes<L>(seed, (first_block + uint64_t(b)) * 16 + uint64_t(lane), words);
      for (int w = 0; w < 4; ++w) {
        const int64_t at = w * kGateLanes + lane;
        const auto uniform =
            __builtin_convertvector(bits_as<typename L::i32>(words[w] >> 1), typename L::f32);
        const auto bound =
            load_f32<L>(bounds + b * kGateBlock + at) * load_f32<L>(limits + phases[w] + lane);
        const auto difference = bits_as<typename L::u32>(bound - uniform);
        all &= difference;
        store_vector(bits + at, words[w]);
        store_vector(signs + at, difference);
      }
    }
    if (!any_bit<L>(~all & 0x80000000u)) [[likely]]
      continue;
    for (int64_t i = 0; i < kGateBlock; ++i) {  // without a branch: hits come at random
      index[hits] = uint32_t(b * kGateBlock + i);
      word[hits] = bits[i];
      hits += 1 - (signs[i] >> 31);
    }
  }
  return hits;
}
FASTIF_LEVELS(gate_at_level, gate_blocks)

}  // namespace

int64_t gate(uint64_t seed, uint64_t first_block, int64_t blocks, const float* bounds,
             const float* limits, int64_t classes, int64_t phase, uint32_t* index, uint32_t* word) {
  return gate_at_level(seed, first_block, blocks, bounds, limits, classes, phase, index, word);
}

}  // namespace fastif
