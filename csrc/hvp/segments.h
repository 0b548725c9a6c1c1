// A vector of p parameters that lies in memory as a list of tensors, cut into chunks for a thread
// pool: what lissa_update_ and hvp_accumulate_ share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/parallel.h"

namespace fastif {

constexpr int64_t kSegmentChunk = 1 << 16;  // elements per task: four streams of it stay in L2

// For each right-hand side r and each fixed chunk of [0, dim), calls
//     body(chunk_index, r, i, t, j, length)
// for every run of the chunk that lies in one tensor: elements i ... i + length - 1 of the vector
// are elements j ... of tensor t. chunk_index counts from 0 to right_hand_sides * ceil(dim / chunk)
// - 1; the runs of one chunk come in order, in one task.
template <class Body>
void for_segments(int64_t right_hand_sides, int64_t dim, const int64_t* lengths, int64_t tensors,
                  const Pool& pool, Body&& body) {
  std::vector<int64_t> starts(tensors + 1, 0);
  for (int64_t t = 0; t < tensors; ++t) starts[t + 1] = starts[t] + lengths[t];
  const int64_t chunks = ceil_div(dim, kSegmentChunk);
  parallel_tasks(pool, right_hand_sides * chunks, [&](int64_t index) {
    const int64_t r = index / chunks;
    const int64_t begin = index % chunks * kSegmentChunk;
    const int64_t end = std::min(dim, begin + kSegmentChunk);
    int64_t t = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (int64_t i = begin; i < end; ++t) {
      const int64_t stop = std::min(end, starts[t + 1]);
      if (stop > i) body(index, r, i, t, i - starts[t], stop - i);
      i = std::max(i, stop);
    }
  });
}

}  // namespace fastif
