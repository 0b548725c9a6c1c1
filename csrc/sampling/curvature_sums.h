// The sums of curvature_terms.h on a CPU, for a tile of rows. To be inlined into the body of a
// FASTIF_LEVELS function.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/simd_levels.h"
#include "sampling/curvature_terms.h"

namespace fastif::curvature {

constexpr int64_t kTileRows = 64;
// The most classes of rows that are turned, so that lanes run over rows; longer ones are worth a
// sum over lanes each.
constexpr int64_t kNarrow = 128;

struct TileSums {
  alignas(64) double e[kTileRows], e_sq[kTileRows], at_max[kTileRows];
};

// Lanes {0, 1} or {2, 3} of each quad of a and b in turn, and their first or second pairs.
template <int kLanes, int kFirst>
struct Interleaved {
  static constexpr int at(int i) { return i / 4 * 4 + kFirst + i % 4 / 2 + i % 2 * kLanes; }
};
template <int kLanes, int kFirst>
struct Paired {
  static constexpr int at(int i) { return i / 4 * 4 + kFirst + i % 2 + i % 4 / 2 * kLanes; }
};

template <class Wide, class Narrow, int... i>
FASTIF_INLINE Wide joined(Narrow a, Narrow b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, i...);
}
// Four floats from each of p, p + step, p + 2 step ...
template <int kBytes>
FASTIF_INLINE typename Level<kBytes>::f32 load_quads(const float* p, int64_t step) {
  if constexpr (kBytes == 16) {
    return load_f32<Level<16>>(p);
  } else {
    return joined<typename Level<kBytes>::f32>(load_quads<kBytes / 2>(p, step),
                                               load_quads<kBytes / 2>(p + kBytes / 32 * step, step),
                                               std::make_integer_sequence<int, kBytes / 4>{});
  }
}

// Columns 0 ... 3 of L::lanes rows.
template <class L>
FASTIF_INLINE void load_columns(const float* rows, int64_t stride, typename L::f32 columns[4]) {
  using V = typename L::f32;
  V row[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) row[i] = load_quads<L::width>(rows + i * stride, 4 * stride);
  const V low01 = picked<Interleaved<L::lanes, 0>>(row[0], row[1]);
  const V low23 = picked<Interleaved<L::lanes, 0>>(row[2], row[3]);
  const V high01 = picked<Interleaved<L::lanes, 2>>(row[0], row[1]);
  const V high23 = picked<Interleaved<L::lanes, 2>>(row[2], row[3]);
  columns[0] = picked<Paired<L::lanes, 0>>(low01, low23);
  columns[1] = picked<Paired<L::lanes, 2>>(low01, low23);
  columns[2] = picked<Paired<L::lanes, 0>>(high01, high23);
  columns[3] = picked<Paired<L::lanes, 2>>(high01, high23);
}

// Of L::lanes rows of at most kNarrow classes, each in a lane. Three floats after them are read.
template <class L>
FASTIF_INLINE void sum_narrow_rows(const float* rows, int64_t classes, double* e, double* e_sq,
                                   double* at_max) {
  using V = typename L::f32;
  V x[kNarrow + 3], max = V{} - std::numeric_limits<float>::infinity();
  for (int64_t c = 0; c < classes; c += 4) load_columns<L>(rows + c, classes, x + c);
  for (int64_t c = 0; c < classes; ++c) max = x[c] > max ? x[c] : max;
  V sum[kTermLanes], sum_sq[kTermLanes], count{};
  auto term = [&](int64_t c) __attribute__((always_inline)) {
    // A piece of the rows after these: to the hardware they are too many streams.
    __builtin_prefetch(rows + (classes + c) * L::lanes);
    const auto term = curvature_term<V, typename L::u32>(x[c] - max);
    count += term.at_max;
    return term;
  };
  int64_t filled = std::min<int64_t>(classes, kTermLanes);
  for (int64_t c = 0; c < filled; ++c) {
    const auto first = term(c);
    sum[c] = first.e;
    sum_sq[c] = first.e_sq;
  }
  for (int64_t c = kTermLanes; c < classes; ++c) {
    const auto next = term(c);
    sum[c % kTermLanes] += next.e;
    sum_sq[c % kTermLanes] += next.e_sq;
  }
  for (int64_t half = kTermLanes / 2; half >= 1; half /= 2) {
    for (int64_t i = 0; i + half < filled; ++i) {
      sum[i] += sum[i + half];
      sum_sq[i] += sum_sq[i + half];
    }
    filled = std::min(filled, half);
  }
  const float *sums = reinterpret_cast<const float*>(sum),
              *sums_sq = reinterpret_cast<const float*>(sum_sq),
              *counts = reinterpret_cast<const float*>(&count);
  for (int half = 0; half < L::lanes; half += L::lanes / 2) {
    store_vector(e + half, load_f64<L>(sums + half));
    store_vector(e_sq + half, load_f64<L>(sums_sq + half));
    store_vector(at_max + half, load_f64<L>(counts + half));
  }
}

template <class L>
FASTIF_INLINE double run_sum(typename L::f32* part) {
  constexpr int kVectors = kTermLanes / L::lanes;
#pragma GCC unroll 8
  for (int half = kVectors / 2; half >= 1; half /= 2)
#pragma GCC unroll 8
    for (int v = 0; v < half; ++v) part[v] += part[v + half];
  return double(sum_f32<L::width>(part[0]));
}

// The vector at row, less the maximum of the row.
template <class L, class T>
FASTIF_INLINE typename L::f32 load_centred(const T* row, accumulate_t<T> max) {
  if constexpr (sizeof(T) == 8) {
    typename L::half_f32 parts[2];
    for (int i = 0; i < 2; ++i)
      parts[i] =
          __builtin_convertvector(load_f64<L>(row + i * L::lanes / 2) - max, typename L::half_f32);
    return load_as<typename L::f32>(&parts[0]);
  } else {
    return load_f32<L>(row) - max;
  }
}

template <class T>
FASTIF_INLINE T lowest() {
  if constexpr (std::is_same_v<T, Half>) {
    return Half{0xfc00};
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return BFloat16{0xff80};
  } else {
    return -std::numeric_limits<T>::infinity();
  }
}

// Of one row of any number of classes, lanes running over classes.
template <class L, class T>
FASTIF_INLINE void sum_wide_row(const T* row, int64_t classes, double* e, double* e_sq,
                                double* at_max) {
  using A = accumulate_t<T>;
  using V = typename L::f32;
  constexpr int kVectors = kTermLanes / L::lanes;
  constexpr int64_t kBlock = L::width / int64_t(sizeof(A));
  const int64_t whole = classes / kTermLanes * kTermLanes;
  T last[kTermLanes];  // what is left of the row, and -inf
  std::fill(last, last + kTermLanes, lowest<T>());
  std::memcpy(last, row + whole, size_t(classes - whole) * sizeof(T));

  auto maxima = load_lanes<L>(last);
  auto raise = [&](auto x) __attribute__((always_inline)) { maxima = x > maxima ? x : maxima; };
  for (int64_t j = kBlock; j < kTermLanes; j += kBlock) raise(load_lanes<L>(last + j));
  for (int64_t j = 0; j < whole; j += kBlock) raise(load_lanes<L>(row + j));
  A lanes[kBlock];
  std::memcpy(lanes, &maxima, sizeof(lanes));
  for (int64_t half = kBlock / 2; half >= 1; half /= 2)
    for (int64_t i = 0; i < half; ++i)
      lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  const A max = lanes[0];

  *e = *e_sq = *at_max = 0;
  for (int64_t run = 0; run < classes; run += kTermRun) {
    V sum[kVectors] = {}, sum_sq[kVectors] = {}, count[kVectors] = {};
    auto add = [&](const T* p, int v) __attribute__((always_inline)) {
      const auto term = curvature_term<V, typename L::u32>(load_centred<L>(p + v * L::lanes, max));
      sum[v] += term.e;
      sum_sq[v] += term.e_sq;
      count[v] += term.at_max;
    };
    const int64_t end = std::min(run + kTermRun, whole);
    for (int64_t j = run; j < end; j += kTermLanes)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) add(row + j, v);
    if (run + kTermRun > whole)
      for (int v = 0; v < kVectors && whole + v * L::lanes < classes; ++v) add(last, v);
    *e += run_sum<L>(sum);
    *e_sq += run_sum<L>(sum_sq);
    *at_max += run_sum<L>(count);
  }
}

// Of at most kTileRows rows. Nothing past logits + readable is read; sums past the rows are
// overwritten.
template <class L, class T>
FASTIF_INLINE void sum_rows(const T* logits, int64_t rows, int64_t classes, int64_t readable,
                            TileSums* sums) {
  static_assert(kTileRows % L::lanes == 0);
  if (sizeof(T) == 8 || classes > kNarrow || 4 * rows <= L::lanes) {
    for (int64_t i = 0; i < rows; ++i)
      sum_wide_row<L>(logits + i * classes, classes, sums->e + i, sums->e_sq + i, sums->at_max + i);
    return;
  }
  for (int64_t i = 0; i < rows; i += L::lanes) {
    const int64_t begin = i * classes, count = std::min<int64_t>(rows - i, L::lanes) * classes;
    float copy[L::lanes * (kNarrow + 1)];
    const float* group;
    if constexpr (std::is_same_v<T, float>) {
      group = logits + begin;
      if (begin + L::lanes * classes + 3 > readable) group = nullptr;
    } else {
      group = nullptr;
    }
    if (group == nullptr) {
      int64_t j = 0;
      for (; j + L::lanes <= count; j += L::lanes)
        store_vector(copy + j, load_lanes<L>(logits + begin + j));
      for (; j < count; ++j) copy[j] = float(to_float(logits[begin + j]));
      std::fill(copy + count, copy + L::lanes * classes + 3, 0.0f);
      group = copy;
    }
    sum_narrow_rows<L>(group, classes, sums->e + i, sums->e_sq + i, sums->at_max + i);
  }
}

}  // namespace fastif::curvature
