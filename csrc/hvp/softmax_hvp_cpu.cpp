#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/flush_denormals.h"
#include "common/simd_levels.h"
#include "hvp/softmax_hvp.h"
#include "hvp/softmax_rows.h"

namespace fastif {
namespace {

constexpr int64_t kTaskElements = 1 << 13;  // microseconds: 10^4 rows of 10 are 13 tasks
constexpr int kNarrowClasses = 16;          // the first for wide_rows

// C at least the number of lanes. A last vector that overlaps the one before it is computed twice
// and counted once.
template <class L, class T>
FASTIF_INLINE void wide_rows_body(SoftmaxRows<T> rows) {
  using A = accumulate_t<T>;
  using V = lanes_t<L, A>;
  using Bits = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  using Mask = typename VectorOf<Bits, L::width>::type;
  constexpr int kLanes = L::width / int(sizeof(A));
  const int64_t whole = rows.classes / kLanes * kLanes, last = rows.classes - kLanes;
  Mask uncounted;
  for (int i = 0; i < kLanes; ++i) uncounted[i] = -Bits(last + i >= whole);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const T *p = rows.probs + i * rows.classes, *z = rows.z + i * rows.row_stride;
    A* u = rows.u + i * rows.row_stride;
    auto tangent = [&](int64_t c) __attribute__((always_inline)) {
      return load_lanes<L>(z + c) + load_lanes<L>(rows.offset + c);
    };
    V dot = bits_as<V>(bits_as<Mask>(load_lanes<L>(p + last) * tangent(last)) & uncounted);
    for (int64_t c = 0; c < whole; c += kLanes) {
      __builtin_prefetch(p + c + kAhead);
      __builtin_prefetch(z + c + kAhead);
      __builtin_prefetch(u + c + kAhead, 1);
      dot += load_lanes<L>(p + c) * tangent(c);
    }
    const A mean = narrow::window_sum<kLanes>(dot)[0];
    const A w = rows.weight == nullptr ? A(1) : rows.weight[i];
    for (int64_t c = 0; c < whole; c += kLanes)
      store_vector(u + c, w * (load_lanes<L>(p + c) * (tangent(c) - mean)));
    if (whole < rows.classes)
      store_vector(u + last, w * (load_lanes<L>(p + last) * (tangent(last) - mean)));
  }
}
FASTIF_LEVELS(wide_rows, wide_rows_body)

template <class T, int kClasses = 1>
void hvp_rows(const SoftmaxRows<T>& rows) {
  if constexpr (kClasses == kNarrowClasses) {
    wide_rows(rows);
  } else if (rows.classes == kClasses) {
    narrow::rows(narrow::Classes<kClasses>{}, rows);
  } else {
    hvp_rows<T, kClasses + 1>(rows);
  }
}

}  // namespace

template <class T>
void softmax_hvp_rows(const SoftmaxHvp<T>& task, int64_t begin, int64_t end) {
  const FlushDenormals<T> flush;
  const std::vector<accumulate_t<T>> none(task.offset == nullptr ? task.classes : 0);
  for (int64_t r = 0; r < task.right_hand_sides; ++r) {
    hvp_rows(SoftmaxRows<T>{task.probs, task.z + r * task.rhs_stride,
                            task.offset == nullptr ? none.data() : task.offset + r * task.classes,
                            task.weight, task.u + r * task.rhs_stride, task.classes,
                            task.row_stride, begin, end});
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
