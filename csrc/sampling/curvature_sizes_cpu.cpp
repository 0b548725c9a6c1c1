#include "sampling/curvature_sizes.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "common/numeric_types.h"
#include "sampling/curvature_rows.h"
#include "sampling/curvature_sums.h"

namespace fastif {
namespace {

using curvature::kTileRows;
using curvature::TileSums;

constexpr int64_t kTask = 1 << 15;  // elements

// Sizes of at most kTileRows rows; curvatures[i] is NaN for an irregular row. Returns whether all
// sizes can be used as they are.
template <class L, class T>
FASTIF_INLINE bool tile_body(const T* logits, int64_t rows, int64_t classes, int64_t readable,
                             const double* scale, double* curvatures, float* sizes) {
  using V = typename L::f64;
  constexpr int kLanes = L::lanes / 2;
  constexpr double kMax = std::numeric_limits<double>::max();
  TileSums sums;
  if (classes > 0) sum_rows<L>(logits, rows, classes, readable, &sums);
  alignas(64) double scales[kTileRows];
  alignas(64) float rounded[kTileRows];
  const int64_t summed = classes > 0 ? rows : 0;
  const int64_t padded = ceil_div(rows, int64_t{kLanes}) * kLanes;
  std::fill(sums.e + summed, sums.e + padded, 0.0);  // of a row of one class, whose size is 0
  std::fill(sums.e_sq + summed, sums.e_sq + padded, 0.0);
  std::fill(sums.at_max + summed, sums.at_max + padded, 0x1p32);
  std::fill(scales, scales + padded, 1.0);
  if (scale != nullptr) std::copy(scale, scale + rows, scales);
  V unusable{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const V curvature = curvature_of(load_f64<L>(sums.e + i), load_f64<L>(sums.e_sq + i),
                                     load_f64<L>(sums.at_max + i));
    const V factor = load_f64<L>(scales + i), size = exact_mul(curvature, factor);
    store_vector(curvatures + i, curvature);
    store_vector(rounded + i, __builtin_convertvector(size, typename L::half_f32));
    // Below what rounds to infinity as a float; NaN is not.
    const V one = V{} + 1.0;
    unusable += size < 0x1.ffffffp127 ? V{} : one;
    unusable += factor >= 0.0 ? V{} : one;
    unusable += factor <= kMax ? V{} : one;
  }
  std::copy(rounded, rounded + rows, sizes);
  double any = 0;
  for (int i = 0; i < kLanes; ++i) any += unusable[i];
  return any == 0;
}
FASTIF_LEVELS(tile, tile_body)

// Sizes of a tile in which some row is irregular or some scale bad.
template <class T>
void repair_tile(const T* logits, int64_t rows, int64_t classes, const double* scale,
                 const double* curvatures, float* sizes, CurvatureRun* tile) {
  *tile = {rows, 0};
  for (int64_t i = 0; i < rows; ++i) {
    double size = curvatures[i];
    bool bad = false;
    if (std::isnan(size)) {
      size = 0;
      bad = irregular_row_kind(logits + i * classes, classes) == RowKind::kInfinite;
      tile->undefined += !bad;
    }
    if (scale != nullptr) {
      bad |= !(scale[i] >= 0) || !std::isfinite(scale[i]);
      size = exact_mul(size, scale[i]);
    }
    sizes[i] = float(size);
    if ((bad || !std::isfinite(sizes[i])) && tile->first_bad == rows) tile->first_bad = i;
  }
}

}  // namespace

template <class T>
CurvatureRun curvature_rows(const CurvatureSizes<T>& task, int64_t begin, int64_t end,
                            float* sizes) {
  CurvatureRun run{end - begin, 0};
  for (int64_t row = begin; row < end; row += kTileRows) {
    const int64_t rows = std::min(kTileRows, end - row), classes = task.classes;
    const T* logits = task.logits + row * classes;
    const double* scale = task.row_scale ? task.row_scale + row : nullptr;
    double curvatures[kTileRows];
    float* out = sizes + (row - begin);
    if (tile(logits, rows, classes, (task.n - row) * classes, scale, &curvatures[0], out)) continue;
    CurvatureRun repaired;
    repair_tile(logits, rows, classes, scale, curvatures, out, &repaired);
    run.undefined += repaired.undefined;
    if (repaired.first_bad < rows)
      run.first_bad = std::min(run.first_bad, row - begin + repaired.first_bad);
  }
  return run;
}

template <class T>
BadRow describe_bad_row(const CurvatureSizes<T>& task, int64_t row) {
  const RowKind kind = irregular_row_kind(task.logits + row * task.classes, task.classes);
  return {row, kind == RowKind::kInfinite};
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
