// What a sampling operator is asked for, and where its sample goes.
#pragma once

#include <cstdint>

namespace fastif {

struct Draw {
  int64_t classes;  // Y
  int64_t k;
  bool replacement;
  uint64_t seed;
  uint64_t row_offset;  // global id of row 0
};

struct Sample {
  int64_t* rows;         // [Y, k] global ids, -1 padded
  float* log_keys;       // [Y, k] descending, -inf padded
  float* log_threshold;  // [Y]
};

}  // namespace fastif
