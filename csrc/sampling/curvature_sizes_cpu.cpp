#include "sampling/curvature_sizes.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "common/numeric_types.h"
#include "sampling/curvature_rows.h"
#include "sampling/softmax_row.h"

namespace fastif {
namespace {

constexpr int64_t kTask = 1 << 15;  // elements

template <class L, class T>
FASTIF_INLINE void row_run_body(const T* logits, int64_t rows, int64_t classes, const double* scale,
                                float* sizes, CurvatureRun* out) {
  *out = {rows, 0};
  for (int64_t i = 0; i < rows; ++i) {
    double size = 0;
    bool bad = false;
    if (classes > 0) {
      const SoftmaxRow row = softmax_row<L>(logits + i * classes, classes);
      if (row.kind == RowKind::kRegular) size = row.curvature();
      out->undefined += row.kind == RowKind::kUndefined;
      bad = row.kind == RowKind::kInfinite;
    }
    if (scale != nullptr) {
      bad |= !(scale[i] >= 0) || !std::isfinite(scale[i]);
      size *= scale[i];
    }
    sizes[i] = float(size);
    if ((bad || !std::isfinite(sizes[i])) && out->first_bad == rows) out->first_bad = i;
  }
}
FASTIF_LEVELS(row_run, row_run_body)

template <class L, class T>
FASTIF_INLINE void exact_row_body(const T* row, int64_t classes, SoftmaxRow* out) {
  *out = softmax_row<L>(row, classes);
}
FASTIF_LEVELS(exact_row, exact_row_body)

}  // namespace

template <class T>
CurvatureRun curvature_rows(const CurvatureSizes<T>& task, int64_t begin, int64_t end,
                            float* sizes) {
  CurvatureRun run;
  row_run(task.logits + begin * task.classes, end - begin, task.classes,
          task.row_scale ? task.row_scale + begin : nullptr, sizes, &run);
  return run;
}

template <class T>
BadRow describe_bad_row(const CurvatureSizes<T>& task, int64_t row) {
  if (task.classes == 0) return {row, false};
  SoftmaxRow exact;
  exact_row(task.logits + row * task.classes, task.classes, &exact);
  return {row, exact.kind == RowKind::kInfinite};
}

template <class T>
BadRow curvature_sizes_cpu(const CurvatureSizes<T>& task, float* sizes, const Pool& pool) {
  const int64_t rows = std::max<int64_t>(1, kTask / std::max<int64_t>(1, task.classes));
  std::mutex mutex;
  int64_t first_bad = task.n;
  parallel_tasks(pool, ceil_div(task.n, rows), [&](int64_t index) {
    const int64_t begin = index * rows, end = std::min(task.n, begin + rows);
    const CurvatureRun run = curvature_rows(task, begin, end, sizes + begin);
    if (begin + run.first_bad < end) {
      const std::lock_guard lock(mutex);
      first_bad = std::min(first_bad, begin + run.first_bad);
    }
  });
  return first_bad < task.n ? describe_bad_row(task, first_bad) : BadRow{};
}

#define FASTIF_INSTANTIATE(T)                                                               \
  template CurvatureRun curvature_rows(const CurvatureSizes<T>&, int64_t, int64_t, float*); \
  template BadRow describe_bad_row(const CurvatureSizes<T>&, int64_t);                      \
  template BadRow curvature_sizes_cpu(const CurvatureSizes<T>&, float*, const Pool&)
FASTIF_INSTANTIATE(float);
FASTIF_INSTANTIATE(double);
FASTIF_INSTANTIATE(Half);
FASTIF_INSTANTIATE(BFloat16);
#undef FASTIF_INSTANTIATE

}  // namespace fastif
