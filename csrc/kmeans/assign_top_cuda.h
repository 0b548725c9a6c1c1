// The best scores of a row, and how a block keeps them for the rows of its tile. Only *_cuda.cu
// files include this.
#pragma once

#include <climits>
#include <cmath>
#include <limits>

#include "common/launch.h"

namespace fastif {
namespace {

// The three largest scores of a row and the centroids of the first two. The third tells whether
// the first two are the only centroids that can be nearest.
template <class A>
struct TopThree {
  static constexpr int kNone = INT_MAX;
  A best, second, third;
  int index, runner_up;

  __device__ static TopThree none() {
    constexpr A kLeast = -std::numeric_limits<A>::infinity();
    return {kLeast, kLeast, kLeast, kNone, kNone};
  }

  // Equal scores stay in the order of their indices. NaN and -inf are never kept.
  __device__ __forceinline__ void add(A score, int j) {
    if (score > best || (score == best && j < index)) {
      third = second;
      second = best;
      runner_up = index;
      best = score;
      index = j;
    } else if (score > second || (score == second && j < runner_up)) {
      third = second;
      second = score;
      runner_up = j;
    } else if (score > third) {
      third = score;
    }
  }
  __device__ __forceinline__ void add(const TopThree& other) {
    if (other.index != kNone) add(other.best, other.index);
    if (other.runner_up != kNone) add(other.second, other.runner_up);
    third = other.third > third ? other.third : third;
  }
};

// Every thread's TopThree of kRows rows, in shared memory: in registers they would not leave room
// for a tile's accumulators, and after the first centroids a score rarely changes them.
template <class A, int kRows, int kThreads>
class Board {
 public:
  static constexpr int kBytes = kRows * kThreads * int(3 * sizeof(A) + 2 * sizeof(int));

  __device__ explicit Board(unsigned char* shared)
      : scores_(reinterpret_cast<A*>(shared)),
        indices_(reinterpret_cast<int*>(scores_ + 3 * kRows * kThreads)) {}

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int row = 0; row < kRows; ++row) put(row, TopThree<A>::none());
  }

  // Offers kCount scores of this thread's row: score(i) of centroid column(i), indices above all
  // that came before. One maximum settles most offers.
  template <int kCount, class Score, class Column>
  __device__ __forceinline__ void offer(int row, Score score, Column column) {
    using std::fmax;
    A most = score(0);
#pragma unroll
    for (int i = 1; i < kCount; ++i)
      most = fmax(most, score(i));  // of a number and NaN: the number
    if (!(most > scores_[at(2, row, threadIdx.x)])) return;
    TopThree<A> top = get(row, threadIdx.x);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (score(i) > top.third) top.add(score(i), column(i));
    put(row, top);
  }

  __device__ __forceinline__ TopThree<A> get(int row, int thread) const {
    return {scores_[at(0, row, thread)], scores_[at(1, row, thread)], scores_[at(2, row, thread)],
            indices_[at(0, row, thread)], indices_[at(1, row, thread)]};
  }

 private:
  __device__ static __forceinline__ int at(int field, int row, int thread) {
    return (field * kRows + row) * kThreads + thread;
  }
  __device__ __forceinline__ void put(int row, const TopThree<A>& top) {
    scores_[at(0, row, threadIdx.x)] = top.best;
    scores_[at(1, row, threadIdx.x)] = top.second;
    scores_[at(2, row, threadIdx.x)] = top.third;
    indices_[at(0, row, threadIdx.x)] = top.index;
    indices_[at(1, row, threadIdx.x)] = top.runner_up;
  }

  A* scores_;
  int* indices_;
};

}  // namespace
}  // namespace fastif
