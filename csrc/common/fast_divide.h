// Division of small unsigned integers by a number known at launch: one multiplication.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace fastif {

// Exact for dividends and divisors below 2^16.
struct FastDivide {
  uint32_t divisor, magic;

  explicit FastDivide(int64_t by)
      : divisor(uint32_t(by)), magic(uint32_t(((uint64_t{1} << 32) + by - 1) / by)) {}
  FASTIF_HOST_DEVICE uint32_t quotient(uint32_t dividend) const {
    return divisor == 1 ? dividend : uint32_t(uint64_t{dividend} * magic >> 32);
  }
};

}  // namespace fastif
