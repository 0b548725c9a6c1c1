#include "sampling/bottom_k.h"

#include <cmath>
#include <limits>
#include <mutex>
#include <vector>

#include "common/clones.h"
#include "common/numeric_types.h"
#include "sampling/draw.h"

namespace fastif {
namespace {

constexpr float kSmallest = 1e-30f;  // bounds of smaller weights: normal numbers, above them

// Raises max[l] to the largest of w[i * lanes + l], i < count / lanes, and tells whether all are
// valid. Written lane by lane, so that the compiler makes vectors of it.
template <class T>
FASTIF_CLONES bool largest_each(const T* w, int64_t count, int64_t stride, int64_t lanes,
                                accumulate_t<T>* max) {
  using A = accumulate_t<T>;
  constexpr A kMost = std::numeric_limits<A>::max();
  int32_t invalid = 0;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t l = 0; l < lanes; ++l) {
      const A x = to_float(w[i * stride + l]);
      invalid |= int32_t(!(x >= A(0))) | int32_t(!(x <= kMost));
      max[l] = x > max[l] ? x : max[l];
    }
  }
  return invalid == 0;
}

// The same for one line of weights.
template <class T>
bool largest(const T* w, int64_t count, int64_t stride, accumulate_t<T>* max) {
  constexpr int64_t kLanes = 16;
  if (stride != 1) return largest_each(w, count, stride, 1, max);
  accumulate_t<T> lanes[kLanes] = {};
  const int64_t whole = count / kLanes;
  bool valid = largest_each(w, whole, kLanes, kLanes, lanes);
  for (const auto lane : lanes) *max = std::max(*max, lane);
  valid &= largest_each(w + whole * kLanes, count - whole * kLanes, 1, 1, max);
  return valid;
}

// bounds[i] = w[i * stride] / max, not below kSmallest unless the weight is zero.
template <class T>
FASTIF_CLONES void scale_down(const T* w, int64_t count, int64_t stride, double inverse,
                              float* bounds, int64_t bounds_stride) {
  for (int64_t i = 0; i < count; ++i) {
    const auto x = to_float(w[i * stride]);
    const float scaled = float(double(x) * inverse);
    const float bound = scaled > kSmallest ? scaled : kSmallest;
    bounds[i * bounds_stride] = x > 0 ? bound : 0.0f;
  }
}

template <class T>
class WeightSource {
 public:
  WeightSource(const Weights<T>& weights, std::vector<double> max)
      : w_(weights), max_(std::move(max)) {}

  struct Tile {
    int64_t row;
  };

  int64_t load(Tile& tile, int64_t row, int64_t rows, float* bounds) const {
    tile.row = row;
    for (int64_t r = 0; r < w_.lines; ++r) {
      // 1 / max may overflow below 1e-300: all bounds are then kSmallest or 0, as log_unit knows.
      const double inverse = max_[r] > 1e-300 ? 1 / max_[r] : 0;
      scale_down(at(row, r), rows, w_.step_stride, inverse, bounds + r, w_.lines);
    }
    return 0;
  }
  double log_unit(int64_t y) const {
    return max_[y] > 1e-300 ? std::log(max_[y]) : std::log(1e-300 / double(kSmallest));
  }
  double log_size(const Tile& tile, int64_t i, int64_t y) const {
    return exact_log(double(to_float(*at(tile.row + i, y))));
  }
  double log_key(const Candidate& candidate, int64_t) const { return candidate.key; }
  double accuracy() const { return 0; }

 private:
  const T* at(int64_t row, int64_t r) const {
    return w_.data + row * w_.step_stride + r * w_.line_stride;
  }

  Weights<T> w_;
  std::vector<double> max_;
};

template <class T>
bool valid_element(const Weights<T>& w, int64_t r, int64_t i) {
  const auto x = to_float(w.data[r * w.line_stride + i * w.step_stride]);
  return x >= 0 && std::isfinite(x);
}

// The largest weight of each line; false if a weight is invalid.
template <class T>
bool line_maxima(const Weights<T>& w, std::vector<double>& max, const Pool& pool) {
  const int64_t task = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, w.lines));
  std::mutex mutex;
  bool valid = true;
  parallel_tasks(pool, ceil_div(w.n, task), [&](int64_t index) {
    const int64_t begin = index * task, end = std::min(w.n, begin + task);
    std::vector<accumulate_t<T>> local(w.lines, 0);
    bool good = true;
    const T* first = w.data + begin * w.step_stride;
    if (w.line_stride == 1) {
      good = largest_each(first, end - begin, w.step_stride, w.lines, local.data());
    } else {
      for (int64_t r = 0; r < w.lines; ++r)
        good &= largest(first + r * w.line_stride, end - begin, w.step_stride, &local[r]);
    }
    const std::lock_guard lock(mutex);
    valid &= good;
    for (int64_t r = 0; r < w.lines; ++r) max[r] = std::max(max[r], double(local[r]));
  });
  return valid;
}

}  // namespace

template <class T>
int64_t bottom_k_cpu(const Weights<T>& weights, const Draw& draw, const Sample& out,
                     const Pool& pool) {
  std::vector<double> max(weights.lines, 0.0);
  if (!line_maxima(weights, max, pool)) {
    for (int64_t r = 0; r < weights.lines; ++r)
      for (int64_t i = 0; i < weights.n; ++i)
        if (!valid_element(weights, r, i)) return r * weights.n + i;
  }
  draw_sample(WeightSource<T>(weights, std::move(max)), draw, weights.n, out, pool);
  return -1;
}

template int64_t bottom_k_cpu(const Weights<float>&, const Draw&, const Sample&, const Pool&);
template int64_t bottom_k_cpu(const Weights<double>&, const Draw&, const Sample&, const Pool&);
template int64_t bottom_k_cpu(const Weights<Half>&, const Draw&, const Sample&, const Pool&);
template int64_t bottom_k_cpu(const Weights<BFloat16>&, const Draw&, const Sample&, const Pool&);

}  // namespace fastif
