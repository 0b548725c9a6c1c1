#include <algorithm>
#include <vector>

#include "common/clones.h"
#include "common/simd.h"
#include "hvp/softmax_hvp.h"
#include "hvp/softmax_rows.h"

namespace fastif {
namespace {

constexpr int64_t kTaskElements = 1 << 15;
constexpr int kNarrowClasses = 16;  // the first for wide_rows

// Rows begin ... end - 1 of one right-hand side, C at least the number of lanes. A last vector that
// overlaps the one before it is computed twice and counted once. `offset` is not null.
template <class T>
FASTIF_CLONES void wide_rows(const T* probs, const T* z, const accumulate_t<T>* offset,
                             const accumulate_t<T>* weight, accumulate_t<T>* u, int64_t classes,
                             int64_t row_stride, int64_t begin, int64_t end) {
  using V = typename Simd<T>::vector;
  constexpr int64_t kLanes = Simd<T>::lanes;
  const int64_t whole = classes / kLanes * kLanes, last = classes - kLanes;
  for (int64_t i = begin; i < end; ++i) {
    const T* p = probs + i * classes;
    const T* x = z + i * row_stride;
    accumulate_t<T>* out = u + i * row_stride;
    V dot{};
    for (int64_t c = 0; c < whole; c += kLanes)
      dot += load(p + c) * (load(x + c) + load(offset + c));
    accumulate_t<T> mean = sum_lanes(dot);
    for (int64_t c = whole; c < classes; ++c) mean += to_float(p[c]) * (to_float(x[c]) + offset[c]);
    const accumulate_t<T> w = weight == nullptr ? accumulate_t<T>(1) : weight[i];
    for (int64_t c = 0; c < whole; c += kLanes)
      store(out + c, w * (load(p + c) * (load(x + c) + load(offset + c) - mean)));
    if (whole < classes)
      store(out + last, w * (load(p + last) * (load(x + last) + load(offset + last) - mean)));
  }
}

template <class T>
using RowsFunction = decltype(&wide_rows<T>);

// The function for rows of `classes` classes, which is at least 1.
template <class T, int kClasses = 1>
RowsFunction<T> rows_function(int64_t classes) {
  if constexpr (kClasses < kNarrowClasses) {
    if (classes > kClasses) return rows_function<T, kClasses + 1>(classes);
    return
        [](const T* probs, const T* z, const accumulate_t<T>* offset, const accumulate_t<T>* weight,
           accumulate_t<T>* u, int64_t, int64_t row_stride, int64_t begin, int64_t end) {
          narrow::rows(narrow::Classes<kClasses>{}, probs, z, offset, weight, u, row_stride, begin,
                       end);
        };
  } else {
    return wide_rows<T>;
  }
}

}  // namespace

template <class T>
void softmax_hvp_rows(const SoftmaxHvp<T>& task, int64_t begin, int64_t end) {
  const auto rows = rows_function<T>(task.classes);
  const std::vector<accumulate_t<T>> none(task.offset == nullptr ? task.classes : 0);
  for (int64_t r = 0; r < task.right_hand_sides; ++r) {
    rows(task.probs, task.z + r * task.rhs_stride,
         task.offset == nullptr ? none.data() : task.offset + r * task.classes, task.weight,
         task.u + r * task.rhs_stride, task.classes, task.row_stride, begin, end);
  }
}

template <class T>
void softmax_hvp_cpu(const SoftmaxHvp<T>& task, const Pool& pool) {
  if (task.classes == 0) return;
  const int64_t rows = std::max<int64_t>(16, kTaskElements / task.classes / 16 * 16);
  parallel_tasks(pool, ceil_div(task.n, rows), [&](int64_t index) {
    softmax_hvp_rows(task, index * rows, std::min(task.n, (index + 1) * rows));
  });
}

template void softmax_hvp_cpu(const SoftmaxHvp<float>&, const Pool&);
template void softmax_hvp_cpu(const SoftmaxHvp<double>&, const Pool&);
template void softmax_hvp_cpu(const SoftmaxHvp<Half>&, const Pool&);
template void softmax_hvp_cpu(const SoftmaxHvp<BFloat16>&, const Pool&);
template void softmax_hvp_rows(const SoftmaxHvp<float>&, int64_t, int64_t);
template void softmax_hvp_rows(const SoftmaxHvp<double>&, int64_t, int64_t);

}  // namespace fastif
