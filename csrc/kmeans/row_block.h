// Rows in the type of arithmetic: the rows themselves, or a float copy of half-precision rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/aligned.h"
#include "common/clones.h"
#include "common/simd.h"

namespace fastif {
namespace {

template <class T>
FASTIF_CLONES void widen(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

template <class T>
class RowBlock {
  using A = accumulate_t<T>;
  static constexpr bool kCopy = !std::is_same_v<T, A>;

 public:
  // capacity: the most values that will be asked for at once.
  explicit RowBlock(int64_t capacity) : copy_(kCopy ? capacity : 0) {}
  // Valid until the next call.
  const A* values(const T* rows, int64_t count) {
    if constexpr (kCopy) {
      widen(rows, count, copy_.get());
      return copy_.get();
    } else {
      return rows;
    }
  }

 private:
  Scratch<A> copy_;
};

}  // namespace
}  // namespace fastif
