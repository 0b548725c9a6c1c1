// softmax_hvp on rows of fewer than 16 classes, which no vector of the machine fits: as many whole
// rows to a vector as there is room for, or one row to a few vectors.
//
// Everything about the layout is fixed when C is: a row's sum is a few shifts of the vector by
// constants. Turning the rows, so that lanes run over them, costs more than the sums do.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/simd_levels.h"
#include "hvp/softmax_hvp.h"

namespace fastif {

// Rows begin ... end - 1 of one right-hand side.
template <class T>
struct SoftmaxRows {
  const T *probs, *z;
  const accumulate_t<T>* offset;  // not null
  const accumulate_t<T>* weight;  // or null
  accumulate_t<T>* u;
  int64_t classes, row_stride, begin, end;
};

// Elements of z and u that are fetched ahead: the hardware's own prefetch stops at every page.
constexpr int64_t kAhead = 512;

namespace narrow {

template <int kClasses>
using Classes = std::integral_constant<int, kClasses>;

template <int kLanes, int kShift>
struct Shift {  // lane i + kShift
  static constexpr int at(int i) { return (i + kShift) % kLanes; }
};
template <int kLanes, int kClasses>
struct First {  // the first lane of lane i's row
  static constexpr int at(int i) { return i / kClasses * kClasses % kLanes; }
};
template <int kLanes, int kClasses>
struct Row {  // the number of lane i's row
  static constexpr int at(int i) { return i / kClasses; }
};
template <int kLanes, int kCount>
struct Leading {  // the first kCount lanes, and zeros
  static constexpr int at(int i) { return i < kCount ? i : kLanes + i; }
};

// Lane i: the sum of lanes i ... i + kCount - 1.
template <int kCount, class V>
FASTIF_INLINE V window_sum(V v) {
  constexpr int kLanes = sizeof(V) / sizeof(v[0]), kHalf = kCount / 2;
  if constexpr (kCount == 1) {
    return v;
  } else {
    V sum = window_sum<kHalf>(v);
    sum += picked<Shift<kLanes, kHalf>>(sum, sum);
    if constexpr (kCount % 2 == 1) sum += picked<Shift<kLanes, kCount - 1>>(v, v);
    return sum;
  }
}

// The arithmetic on one group of rows: kRows rows of C in one vector, or one row in kVectors.
template <class L, class T, int C, int kRows_>
struct Group {
  using A = accumulate_t<T>;
  using V = lanes_t<L, A>;
  static constexpr int kLanes = L::width / int(sizeof(A));
  static constexpr int kVectors = (C + kLanes - 1) / kLanes;
  static constexpr int kElements = kVectors * kLanes;  // read from each of probs and z
  static constexpr int kRows = kRows_;

  static FASTIF_INLINE void hvp(const T* probs, const T* z, const V* offset, V weight, V* u) {
    V p[kVectors], x[kVectors], dot{};
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
      p[j] = load_lanes<L>(probs + j * kLanes);
      x[j] = load_lanes<L>(z + j * kLanes) + offset[j];
      const V product = p[j] * x[j];
      constexpr int kRest = C - (kVectors - 1) * kLanes;
      dot += kVectors > 1 && j == kVectors - 1 ? picked<Leading<kLanes, kRest>>(product, V{})
                                               : product;
    }
    dot = window_sum<std::min(C, kLanes)>(dot);
    const V mean = picked<First<kLanes, C>>(dot, dot);
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) u[j] = weight * (p[j] * (x[j] - mean));
  }
};

// kDense: rows follow one another without gaps. Vectors are then stored whole, and the next row
// overwrites what is too much: pieces of them go by way of the stack, at 1.7 times the time for 10
// classes (one thread of a Xeon).
template <class L, class G, bool kDense, class T, int C>
FASTIF_INLINE void rows_of_group(const SoftmaxRows<T>& rows) {
  using A = accumulate_t<T>;
  using V = typename G::V;
  A lanes[G::kElements] = {};
  for (int c = 0; c < G::kRows * C; ++c) lanes[c] = rows.offset[c % C];
  V shift[G::kVectors], out[G::kVectors];
  std::memcpy(shift, lanes, sizeof(shift));

  // Whole vectors may be read and stored at row i where they end within the last row.
  const int64_t spare = std::max<int64_t>(G::kElements - C, 0);
  const int64_t whole =
      rows.end - std::max(1 + ceil_div(spare, C), int64_t{G::kRows > 1 ? G::kLanes : 1});
  int64_t i = rows.begin;
  for (; i <= whole; i += G::kRows) {
    V w = V{} + 1;
    if (rows.weight != nullptr) {
      if constexpr (G::kRows > 1) {
        const V next = load_lanes<L>(rows.weight + i);
        w = picked<Row<G::kLanes, C>>(next, next);
      } else {
        w = V{} + rows.weight[i];
      }
    }
    __builtin_prefetch(rows.z + i * rows.row_stride + kAhead);
    __builtin_prefetch(rows.u + i * rows.row_stride + kAhead, 1);
    G::hvp(rows.probs + i * C, rows.z + i * rows.row_stride, shift, w, out);
    constexpr int kStored = kDense ? G::kElements : G::kRows * C;
    std::memcpy(rows.u + i * rows.row_stride, out, kStored * sizeof(A));
  }
  for (; i < rows.end; ++i) {
    T p[G::kElements] = {}, x[G::kElements] = {};
    std::memcpy(p, rows.probs + i * C, C * sizeof(T));
    std::memcpy(x, rows.z + i * rows.row_stride, C * sizeof(T));
    G::hvp(p, x, shift, V{} + (rows.weight == nullptr ? A(1) : rows.weight[i]), out);
    std::memcpy(rows.u + i * rows.row_stride, out, C * sizeof(A));
  }
}

template <class L, int C, class T>
FASTIF_INLINE void rows_body(Classes<C>, SoftmaxRows<T> rows) {
  constexpr int kFit = L::width / int(sizeof(accumulate_t<T>)) / C;
  if (rows.row_stride == C) {
    rows_of_group<L, Group<L, T, C, std::max(kFit, 1)>, true, T, C>(rows);
  } else {
    rows_of_group<L, Group<L, T, C, 1>, false, T, C>(rows);
  }
}
FASTIF_LEVELS(rows, rows_body)

}  // namespace narrow
}  // namespace fastif
