// softmax_stats.h on a CPU.
#pragma once

#include <cstdint>
#include <limits>

#include "common/exact_math.h"
#include "common/simd_levels.h"
#include "sampling/softmax_stats.h"

namespace fastif {

// To be inlined into the body of a FASTIF_LEVELS function.
template <class L, class T>
FASTIF_INLINE SoftmaxRow softmax_row(const T* row, int64_t classes) {
  using V = typename L::f64;
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr int kLanes = L::lanes / 2, kVectors = kSumLanes / kLanes;
  const int64_t whole = classes / kSumLanes * kSumLanes, tail = classes - whole;
  double last[kSumLanes];  // what is left of the row, and -inf
  for (int i = 0; i < kSumLanes; ++i)
    last[i] = i < tail ? double(to_float(row[whole + i])) : -kInfinity;

  V maxima[kVectors];
  for (int v = 0; v < kVectors; ++v) maxima[v] = load_f64<L>(last + v * kLanes);
  for (int64_t j = 0; j < whole; j += kSumLanes) {
    for (int v = 0; v < kVectors; ++v) {
      const V x = load_f64<L>(row + j + v * kLanes);
      maxima[v] = x > maxima[v] ? x : maxima[v];
    }
  }
  const double max = max_f64<L::width>(maxima);

  double sum = 0;
  V at_max[kVectors] = {};
  for (int64_t run = 0; run < classes; run += kSumRun) {
    const int64_t end = classes < run + kSumRun ? whole : run + kSumRun;
    V part[kVectors] = {};
    auto add = [&](int v, V x) __attribute__((always_inline)) {
      V d = x - max;
      d = d < kLeastExponent ? V{} + kLeastExponent : d;  // keeps NaN
      at_max[v] += x == max ? V{} + 1.0 : V{};
      part[v] += x == max ? V{} : exact_exp<V, typename L::u64>(d);
    };
    for (int64_t j = run; j < end; j += kSumLanes)
      for (int v = 0; v < kVectors; ++v) add(v, load_f64<L>(row + j + v * kLanes));
    if (run + kSumRun >= classes && tail > 0)
      for (int v = 0; v < kVectors; ++v) add(v, load_f64<L>(last + v * kLanes));
    sum += sum_f64<L::width>(part);
  }
  return SoftmaxRow::of(max, sum, sum_f64<L::width>(at_max));
}

}  // namespace fastif
