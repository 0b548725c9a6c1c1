// A vector of p parameters that lies in memory as a list of tensors, cut into chunks for the blocks
// of a kernel: what lissa_update_ and hvp_accumulate_ share. segments.h is the same for a CPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/host_device.h"
#include "common/launch.h"

namespace fastif {

constexpr int kSegmentThreads = 256;
constexpr int kSegmentPack = 4;             // elements that a thread loads at once
constexpr int64_t kSegmentElements = 8192;  // of one tensor and right-hand side, for one block
constexpr int kSegmentTensors = 96;         // the list goes to the kernel by value

template <class G>
struct Segments {
  const G* tensor[kSegmentTensors];          // [R, length]
  int64_t start[kSegmentTensors];            // of the tensor in the vector
  int64_t length[kSegmentTensors];           // elements per right-hand side
  int64_t first_chunk[kSegmentTensors + 1];  // of the tensor among the chunks of one launch
  int64_t chunks_before;                     // chunks of earlier launches
  int count;

  FASTIF_HOST_DEVICE int64_t chunks() const { return first_chunk[count]; }
};

// The chunks of one right-hand side.
inline int64_t segment_chunks(const int64_t* lengths, int64_t tensors) {
  int64_t chunks = 0;
  for (int64_t t = 0; t < tensors; ++t) chunks += ceil_div(lengths[t], kSegmentElements);
  return chunks;
}

// Calls body(segments), which launches a block for each chunk and right-hand side, for lists of at
// most kSegmentTensors tensors.
template <class G, class Body>
void for_segment_lists(const G* const* tensors, const int64_t* lengths, int64_t count,
                       Body&& body) {
  int64_t start = 0, chunks_before = 0;
  for (int64_t first = 0; first < count; first += kSegmentTensors) {
    Segments<G> list{};
    list.count = int(std::min<int64_t>(kSegmentTensors, count - first));
    list.chunks_before = chunks_before;
    for (int t = 0; t < list.count; ++t) {
      list.tensor[t] = tensors[first + t];
      list.start[t] = start;
      list.length[t] = lengths[first + t];
      list.first_chunk[t + 1] = list.first_chunk[t] + ceil_div(list.length[t], kSegmentElements);
      start += list.length[t];
    }
    if (list.chunks() > 0) body(list);
    chunks_before += list.chunks();
  }
}

// The tensor of a chunk.
template <class G>
__device__ __forceinline__ int segment_of(const Segments<G>& list, int64_t chunk) {
  int low = 0, high = list.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (list.first_chunk[middle] <= chunk)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

template <class T>
struct alignas(kSegmentPack * sizeof(T) < 16 ? kSegmentPack * sizeof(T) : 16) SegmentPack {
  T value[kSegmentPack];
};

template <class T>
__device__ __forceinline__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(SegmentPack<T>) == 0;
}
template <class T>
__device__ __forceinline__ SegmentPack<T> load_pack(const T* p, bool whole, int count) {
  if (whole) return *reinterpret_cast<const SegmentPack<T>*>(p);
  SegmentPack<T> pack{};
#pragma unroll
  for (int i = 0; i < kSegmentPack; ++i)
    if (i < count) pack.value[i] = p[i];
  return pack;
}
template <class T>
__device__ __forceinline__ void store_pack(T* p, const SegmentPack<T>& pack, bool whole,
                                           int count) {
  if (whole) {
    *reinterpret_cast<SegmentPack<T>*>(p) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < kSegmentPack; ++i)
    if (i < count) p[i] = pack.value[i];
}

}  // namespace fastif
