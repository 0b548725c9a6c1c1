#include "sampling/gate.h"

#include "common/clones.h"
#include "common/philox.h"
#include "common/simd.h"

namespace fastif {
namespace {

// The product of the lower halves of 64-bit lanes and a 32-bit constant.
FASTIF_INLINE u64x8 widening_product(u64x8 a, uint64_t constant) {
  return (a & 0xffffffffu) * constant;
}

// The words of the 64 elements of one block, 16 to a vector. Counters stand in 64-bit lanes of
// which only the lower half counts, so that no product has to be put together from two halves:
// even elements in `c`, odd ones in `d`.
FASTIF_INLINE void philox_block(uint64_t seed, uint64_t block, u32x16 words[4]) {
  const u64x8 even = {0, 2, 4, 6, 8, 10, 12, 14};
  u64x8 c[4] = {block * 16 + even, {}, {}, {}}, d[4] = {c[0] + 1, {}, {}, {}};
  c[1] = c[0] >> 32;
  d[1] = d[0] >> 32;
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const u64x8 c0 = widening_product(c[0], kPhiloxMul0), c1 = widening_product(c[2], kPhiloxMul1);
    const u64x8 d0 = widening_product(d[0], kPhiloxMul0), d1 = widening_product(d[2], kPhiloxMul1);
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
  for (int w = 0; w < 4; ++w) words[w] = bits_as<u32x16>((c[w] & 0xffffffffu) | (d[w] << 32));
}

FASTIF_INLINE bool any_bit(u32x16 v) {
  uint64_t lanes[8];
  std::memcpy(lanes, &v, sizeof(v));
  uint64_t any = 0;
  for (uint64_t lane : lanes) any |= lane;
  return any != 0;
}

FASTIF_CLONES int64_t gate_blocks(uint64_t seed, uint64_t first_block, int64_t blocks,
                                  const float* bounds, const float* limits, int64_t classes,
                                  int64_t phase, uint32_t* index, uint32_t* word) {
  const int64_t step = kGateLanes % classes;
  int64_t hits = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    u32x16 words[4];
    philox_block(seed, first_block + uint64_t(b), words);
    // A lane passes if its difference has no sign bit. (Comparisons whose result is stored become
    // scalar code.)
    u32x16 difference[4];
    for (int w = 0; w < 4; ++w) {
      const f32x16 uniform = __builtin_convertvector(bits_as<i32x16>(words[w] >> 1), f32x16);
      const f32x16 bound = load(bounds + b * kGateBlock + w * kGateLanes) * load(limits + phase);
      difference[w] = bits_as<u32x16>(bound - uniform);
      phase += step;
      if (phase >= classes) phase -= classes;
    }
    const u32x16 all = difference[0] & difference[1] & difference[2] & difference[3];
    if (!any_bit(~all & 0x80000000u)) [[likely]] continue;
    uint32_t signs[kGateBlock], bits[kGateBlock];
    std::memcpy(signs, difference, sizeof(signs));
    std::memcpy(bits, words, sizeof(bits));
    for (int64_t i = 0; i < kGateBlock; ++i) {  // without a branch: hits come at random
      index[hits] = uint32_t(b * kGateBlock + i);
      word[hits] = bits[i];
      hits += 1 - (signs[i] >> 31);
    }
  }
  return hits;
}

}  // namespace

int64_t gate(uint64_t seed, uint64_t first_block, int64_t blocks, const float* bounds,
             const float* limits, int64_t classes, int64_t phase, uint32_t* index, uint32_t* word) {
  return gate_blocks(seed, first_block, blocks, bounds, limits, classes, phase, index, word);
}

}  // namespace fastif
