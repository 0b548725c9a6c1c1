#include "sampling/curvature_multinomial.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>

#include "common/numeric_types.h"
#include "sampling/curvature_rows.h"
#include "sampling/draw.h"

namespace fastif {
namespace {

template <class T>
class CurvatureSource {
 public:
  CurvatureSource(const CurvatureSizes<T>& task, float floor)
      : task_(task), floor_(floor), first_bad_(task.n) {}

  struct Tile {
    const float* sizes;
  };

  int64_t load(Tile& tile, int64_t row, int64_t rows, float* bounds) const {
    CurvatureRun run = curvature_rows(task_, row, row + rows, bounds);
    for (int64_t i = 0; i < rows; ++i) {
      bounds[i] += floor_;
      if (!std::isfinite(bounds[i])) run.first_bad = std::min(run.first_bad, i);
    }
    tile.sizes = bounds;
    if (run.first_bad < rows) {
      const std::lock_guard lock(mutex_);
      first_bad_ = std::min(first_bad_, row + run.first_bad);
      std::fill(bounds, bounds + rows, 0.0f);
    }
    return run.undefined;
  }
  double log_unit(int64_t) const { return 0; }
  double log_size(const Tile& tile, int64_t i, int64_t) const {
    return exact_log(double(tile.sizes[i]));
  }
  double log_key(const Candidate& candidate, int64_t) const { return candidate.key; }
  double accuracy() const { return 0; }

  int64_t first_bad() const { return first_bad_; }

 private:
  CurvatureSizes<T> task_;
  float floor_;
  mutable std::mutex mutex_;
  mutable int64_t first_bad_;
};

}  // namespace

template <class T>
BadRow curvature_multinomial_cpu(const CurvatureSizes<T>& task, float floor, const Draw& draw,
                                 const Sample& out, int64_t* skipped, const Pool& pool) {
  const CurvatureSource<T> source(task, floor);
  *skipped = draw_sample(source, draw, task.n, out, pool);
  return source.first_bad() < task.n ? describe_bad_row(task, source.first_bad()) : BadRow{};
}

#define FASTIF_INSTANTIATE(T)                                                             \
  template BadRow curvature_multinomial_cpu(const CurvatureSizes<T>&, float, const Draw&, \
                                            const Sample&, int64_t*, const Pool&)
FASTIF_INSTANTIATE(float);
FASTIF_INSTANTIATE(double);
FASTIF_INSTANTIATE(Half);
FASTIF_INSTANTIATE(BFloat16);
#undef FASTIF_INSTANTIATE

}  // namespace fastif
