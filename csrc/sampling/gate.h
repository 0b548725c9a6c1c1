// The gate: which of a run of elements can be among the earliest arrivals of their class?
//
// An element of size p arrives before time T only if its uniform u < E = p A <= p T. So the test
// needs Philox, one multiplication and one comparison; logarithms are left to the few that pass.
#pragma once

#include <cstdint>

namespace fastif {

constexpr int64_t kGateBlock = 64;  // elements of one vector Philox call
constexpr int64_t kGateLanes = 16;
constexpr double kGateUnit = 0x1p31;    // limits are in units of the upper 31 bits of a word
constexpr double kGateMargin = 1.0001;  // over the rounding errors of the comparison itself

// Tests the elements of `blocks` blocks of 64, from element 64 * first_block on. Element i of the
// run passes if its word / 2 <= bounds[i] * limits[class], where classes follow one another from
// `phase` on and start again after `classes` of them. Writes index and Philox word of those that
// pass, and returns their number.
//
// - bounds: one float per element; 0 for elements that are not to be drawn (they may pass).
// - limits: [classes + 16], periodic: limits[i] = limits[i % classes].
int64_t gate(uint64_t seed, uint64_t first_block, int64_t blocks, const float* bounds,
             const float* limits, int64_t classes, int64_t phase, uint32_t* index, uint32_t* word);

}  // namespace fastif
