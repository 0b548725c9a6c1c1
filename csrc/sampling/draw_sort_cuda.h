// Bitonic sort of every class's candidates by (code, row): of up to kSortChunk by the block that
// writes the class's sample, of more by launches over all of the device.
#pragma once

#include "sampling/draw_state_cuda.h"

namespace fastif {

constexpr int kSortChunk = 2048;

// Puts two entries in order.
__device__ __forceinline__ void sort_pair(uint32_t* code, unsigned long long* row, int64_t i,
                                          int64_t j, bool ascending) {
  const uint32_t a = code[i], b = code[j];
  const unsigned long long p = row[i], q = row[j];
  const bool greater = a > b || (a == b && p > q);
  if (greater != ascending) return;
  code[i] = b;
  code[j] = a;
  row[i] = q;
  row[j] = p;
}

// The steps of sizes first_size ... last_size whose distance is below `length`, of `length` entries
// that stand at `start` in the whole. A step's barrier comes before it.
__device__ inline void sort_steps(uint32_t* code, unsigned long long* row, int64_t start,
                                  int length, int64_t first_size, int64_t last_size) {
  for (int64_t size = first_size; size <= last_size; size *= 2) {
    for (int distance = int(size / 2 < length / 2 ? size / 2 : length / 2); distance > 0;
         distance /= 2) {
      __syncthreads();
      for (int p = threadIdx.x; p < length / 2; p += kDrawThreads) {
        const int i = 2 * p - (p & (distance - 1));
        sort_pair(code, row, i, i + distance, ((start + i) & size) == 0);
      }
    }
  }
  __syncthreads();
}

// Entries that are sorted: a power of two for each class, as many as it has or `capacity`.
__device__ __forceinline__ int64_t sort_length(const DrawState& state, int64_t y) {
  const unsigned long long count = state.count[y];
  int64_t length = 2;
  while (length < state.capacity && static_cast<unsigned long long>(length) < count) length *= 2;
  return length;
}

// One block to a chunk: steps that stay within it. `fresh`: fills up what is past the last
// candidate first.
static __global__ void __launch_bounds__(kDrawThreads)
    sort_chunks(DrawState state, int64_t first_size, int64_t last_size, bool fresh) {
  __shared__ uint32_t code[kSortChunk];
  __shared__ unsigned long long row[kSortChunk];
  const int64_t chunks = state.capacity / kSortChunk;
  for (int64_t item = blockIdx.x; item < state.classes * chunks; item += gridDim.x) {
    const int64_t y = item / chunks, start = (item - y * chunks) * kSortChunk;
    const int64_t length = sort_length(state, y);
    if (start >= length || first_size > length) continue;
    const int64_t base = y * state.capacity + start;
    const unsigned long long count = state.count[y];
    for (int i = threadIdx.x; i < kSortChunk; i += kDrawThreads) {
      const bool there = !fresh || static_cast<unsigned long long>(start + i) < count;
      code[i] = there ? state.entry_code[base + i] : kEveryCode;
      row[i] = there ? state.entry_row[base + i] : kNoRow;
    }
    sort_steps(code, row, start, kSortChunk, first_size, last_size);
    for (int i = threadIdx.x; i < kSortChunk; i += kDrawThreads) {
      state.entry_code[base + i] = code[i];
      state.entry_row[base + i] = row[i];
    }
    __syncthreads();
  }
}

// One step of a distance that spans chunks.
static __global__ void __launch_bounds__(kDrawThreads)
    sort_across(DrawState state, int64_t size, int64_t distance) {
  const int64_t half = state.capacity / 2;
  for (int64_t item = blockIdx.x * int64_t(kDrawThreads) + threadIdx.x; item < state.classes * half;
       item += gridDim.x * int64_t(kDrawThreads)) {
    const int64_t y = item / half, p = item - y * half;
    const int64_t i = 2 * p - (p & (distance - 1)), length = sort_length(state, y);
    if (size > length || i >= length) continue;
    sort_pair(state.entry_code + y * state.capacity, state.entry_row + y * state.capacity, i,
              i + distance, (i & size) == 0);
  }
}

// Sorts classes of more than kSortChunk candidates, and all that share the launches.
// `capacity` is a power of two above kSortChunk.
inline void sort_entries(const char* op, const Gpu& gpu, const DrawState& state) {
  const int64_t most = 16 * int64_t(gpu.multiprocessors);
  const unsigned blocks = grid_size(state.classes * (state.capacity / kSortChunk), 1, most);
  launch(op, gpu, sort_chunks, blocks, kDrawThreads, 0, state, int64_t{2}, int64_t{kSortChunk},
         true);
  for (int64_t size = 2 * kSortChunk; size <= state.capacity; size *= 2) {
    for (int64_t distance = size / 2; distance >= kSortChunk; distance /= 2)
      launch(op, gpu, sort_across, grid_size(state.classes * state.capacity / 2, 1024, most),
             kDrawThreads, 0, state, size, distance);
    launch(op, gpu, sort_chunks, blocks, kDrawThreads, 0, state, size, size, false);
  }
}

}  // namespace fastif
