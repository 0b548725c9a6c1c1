// The definition that every sampling operator shares, and the container that keeps its finalists.
//
// Bottom-k / Poisson arrivals. Element e = (row_offset + row) * Y + y of size p >= 0 arrives at
// times A_1 / p < A_2 / p < ..., where A_j = E_1 + ... + E_j sums unit exponentials (philox.h;
// E_j = -log1p(-uniform(seed, e, j - 1))). Without replacement only the first arrival counts, with
// replacement all do. For each class y, the k earliest arrivals are the sample, in this order:
//     log_key = log p - log A, in double, rounded to float32; largest first, ties by row id;
//     log_threshold = the (k+1)-th largest log_key, -inf if there are not k + 1.
// First arrivals are successive sampling (the law of torch.multinomial without replacement); the
// first k arrivals of the superposed processes are k independent draws. Given the threshold, a row
// is in the sample with probability 1 - exp(-p exp(-log_threshold)). As every log_key is a function
// of (seed, global row, class, size) alone, the sample of a union is the top-k of the samples'
// union: chunks, threads and ranks change no bit. All that decides is computed with exact_math.h,
// so neither do SIMD levels, nor is a GPU's sample another.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace fastif {

struct Candidate {
  double key;      // log p - log A, with p as accurate as BottomK was told
  double arrival;  // A
  int64_t row;
};

// Keeps every candidate that may be among the `count` largest log_keys: those whose approximate key
// lies within the slack of the count-th largest one seen. Memory is O(count).
class BottomK {
 public:
  BottomK(int64_t count, double accuracy)
      : count_(count), accuracy_(accuracy), capacity_(2 * count + 64) {}

  // No candidate with a smaller key can be among the largest.
  double floor() const { return floor_; }
  // A floor that holds for the same class elsewhere holds here.
  void raise_floor(double floor) { floor_ = std::max(floor_, floor); }

  // Whether the floor rose. The candidate's key must not lie below the floor.
  bool push(const Candidate& candidate) {
    candidates_.push_back(candidate);
    if (int64_t(candidates_.size()) < capacity_) return false;
    const double before = floor_;
    compact();
    capacity_ = std::max(capacity_, 2 * int64_t(candidates_.size()));
    return floor_ > before;
  }

  // Drops all that cannot be among the largest.
  void compact() {
    if (int64_t(candidates_.size()) <= count_) return;
    auto last = candidates_.begin() + (count_ - 1);
    std::nth_element(candidates_.begin(), last, candidates_.end(),
                     [](const Candidate& a, const Candidate& b) { return a.key > b.key; });
    // Twice the error of a key, and four float32 roundings: ties in float32 go by row id.
    raise_floor(last->key - 2 * accuracy_ - std::abs(last->key) * 0x1p-22);
    std::erase_if(candidates_, [this](const Candidate& c) { return c.key < floor_; });
  }

  const std::vector<Candidate>& candidates() const { return candidates_; }
  void append(const BottomK& other) {
    candidates_.insert(candidates_.end(), other.candidates_.begin(), other.candidates_.end());
  }

 private:
  int64_t count_;
  double accuracy_;
  int64_t capacity_;
  double floor_ = -std::numeric_limits<double>::infinity();
  std::vector<Candidate> candidates_;
};

}  // namespace fastif
