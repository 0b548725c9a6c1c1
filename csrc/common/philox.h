// Philox4x32-10 (Salmon et al. 2011): random words as a function of a counter and a key.
#pragma once

#include <cstdint>

namespace fastif {

struct Words {
  uint32_t w[4];
};

inline Words philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                        uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    const uint32_t n0 = uint32_t(b >> 32) ^ c1 ^ k0, n2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c1 = uint32_t(b);
    c3 = uint32_t(a);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return Words{{c0, c1, c2, c3}};
}

// A uniform in (0, 1) for a global element: 32 bits, and 32 more where the first are below 2^12, so
// that small values keep their relative precision.
inline double uniform(uint64_t seed, uint64_t element) {
  const uint64_t counter = element / 64 * 16 + element % 16;
  const int word = int(element / 16 % 4);
  const uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32);
  const uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  const uint32_t w = philox4x32(c0, c1, 0, 0, k0, k1).w[word];
  if (w >= (1u << 12)) return (w + 0.5) * 0x1p-32;
  const uint32_t low = philox4x32(c0, c1, 1, 0, k0, k1).w[word];
  return (double((uint64_t{w} << 32) + low) + 0.5) * 0x1p-64;
}

}  // namespace fastif
