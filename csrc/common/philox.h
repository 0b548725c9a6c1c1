// Philox4x32-10 (Salmon et al. 2011), and the one layout of its words over elements.
//
// Element e (64-bit) owns, for each arrival, the word (e / 16) % 4 of the block with counter
//     (e / 64 * 16 + e % 16,  0 or 1,  arrival),
// so that 16 lanes with consecutive counters make the words of 64 consecutive elements in order.
// The third counter word is 1 for the further 32 bits that small uniforms draw.
#pragma once

#include <cstdint>

#include "common/exact_math.h"
#include "common/host_device.h"

namespace fastif {

constexpr uint32_t kPhiloxMul0 = 0xD2511F53u, kPhiloxMul1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKey0 = 0x9E3779B9u, kPhiloxKey1 = 0xBB67AE85u;

struct PhiloxBlock {
  uint32_t word[4];
};

FASTIF_HOST_DEVICE inline PhiloxBlock philox4x32(PhiloxBlock counter, uint32_t key0,
                                                 uint32_t key1) {
  uint32_t* c = counter.word;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{c[0]} * kPhiloxMul0, p1 = uint64_t{c[2]} * kPhiloxMul1;
    c[0] = uint32_t(p1 >> 32) ^ c[1] ^ key0;
    c[1] = uint32_t(p1);
    c[2] = uint32_t(p0 >> 32) ^ c[3] ^ key1;
    c[3] = uint32_t(p0);
    key0 += kPhiloxKey0;
    key1 += kPhiloxKey1;
  }
  return counter;
}

FASTIF_HOST_DEVICE inline uint32_t element_word(uint64_t seed, uint64_t element, uint32_t extension,
                                                uint32_t arrival) {
  const uint64_t counter = element / 64 * 16 + element % 16;
  const PhiloxBlock block =
      philox4x32({{uint32_t(counter), uint32_t(counter >> 32), extension, arrival}}, uint32_t(seed),
                 uint32_t(seed >> 32));
  // Selects: an index known only at run time would put the block into a GPU's local memory.
  const uint32_t place = uint32_t(element / 16 % 4);
  const uint32_t low = place == 0 ? block.word[0] : block.word[1];
  const uint32_t high = place == 2 ? block.word[2] : block.word[3];
  return place < 2 ? low : high;
}

// Below this word a uniform takes 32 further bits: bottom-k reads just the tail that 32 bits
// quantise.
constexpr uint32_t kShortWord = 1u << 12;

// uniform() for a caller that has the element's first word already.
FASTIF_HOST_DEVICE inline double uniform_from_word(uint32_t word, uint64_t seed, uint64_t element,
                                                   uint32_t arrival = 0) {
  if (word >= kShortWord) return (word + 0.5) * 0x1p-32;
  const uint64_t bits = uint64_t{word} << 32 | element_word(seed, element, 1, arrival);
  return (double(bits) + 0.5) * 0x1p-64;
}

// Uniform in (0, 1), never 0 or 1; exact to 44 bits near 0.
FASTIF_HOST_DEVICE inline double uniform(uint64_t seed, uint64_t element, uint32_t arrival = 0) {
  return uniform_from_word(element_word(seed, element, 0, arrival), seed, element, arrival);
}

// The unit exponential of a uniform. Small uniforms give small exponentials, without the
// quantisation of -log(u) near 1. The same bits on every machine.
FASTIF_HOST_DEVICE inline double exponential(double uniform) { return -exact_log1p(-uniform); }

}  // namespace fastif
