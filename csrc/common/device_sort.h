// A stable sort of (key, row) pairs on a GPU, in stream order. Only *_cuda.cu files include this.
#pragma once

#include <cstdint>
#include <utility>

#include "common/gpu.h"

namespace fastif {

// Pairs to sort, with memory for a second copy: sorting goes back and forth between the two.
template <class Key>
struct Pairs {
  int64_t count;  // below 2^32
  Key *keys, *spare_keys;
  uint32_t *rows, *spare_rows;

  // Memory for `count` pairs, not initialised.
  Pairs(const Gpu& gpu, int64_t count)
      : count(count),
        keys(gpu.scratch<Key>(count)),
        spare_keys(gpu.scratch<Key>(count)),
        rows(gpu.scratch<uint32_t>(count)),
        spare_rows(gpu.scratch<uint32_t>(count)) {}
  // The rows of other pairs, in their order and memory, with keys still to be written.
  template <class Other>
  Pairs(const Gpu& gpu, const Pairs<Other>& other)
      : count(other.count),
        keys(gpu.scratch<Key>(count)),
        spare_keys(gpu.scratch<Key>(count)),
        rows(other.rows),
        spare_rows(other.spare_rows) {}

  void swap() {
    std::swap(keys, spare_keys);
    std::swap(rows, spare_rows);
  }
};

// Sorts keys below 2^bits, in ascending order; equal keys keep theirs. Key: uint32_t or uint64_t.
template <class Key>
void sort_pairs(const char* op, const Gpu& gpu, Pairs<Key>& pairs, int bits);

}  // namespace fastif
