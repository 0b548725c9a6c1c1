// Sums and maxima over a group of neighbouring lanes, in one fixed order. Only *_cuda.cu files
// include this.
#pragma once

#include "common/launch.h"

namespace fastif {

// Over groups of kLanes lanes (a power of two), each of which gets the result. All lanes of the
// warp must take part.
template <int kLanes, class T>
__device__ __forceinline__ T group_sum(T x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(kWholeWarp, x, distance);
  return x;
}

template <int kLanes, class T>
__device__ __forceinline__ T group_max(T x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(kWholeWarp, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

// Over a block of kThreads threads; thread 0 gets the result. `shared` holds kThreads / 32 values,
// and may be used again after the next __syncthreads().
template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T x, T* shared) {
  x = group_sum<kWarp>(x);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  if (threadIdx.x < kWarp)
    x = group_sum<kWarp>(threadIdx.x < kThreads / kWarp ? shared[threadIdx.x] : T(0));
  return x;
}

// Over a block of kThreads threads, all of which get the result; a NaN in x is not noticed.
// `shared` as in block_sum.
template <int kThreads, class T>
__device__ __forceinline__ T block_max(T x, T* shared) {
  x = group_max<kWarp>(x);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  for (int w = 0; w < kThreads / int(kWarp); ++w) x = shared[w] > x ? shared[w] : x;
  return x;
}

}  // namespace fastif
