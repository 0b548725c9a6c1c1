#include "sampling/class_multinomial.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "common/clones.h"
#include "common/simd_levels.h"
#include "common/vexp.h"
#include "sampling/draw.h"
#include "sampling/softmax_row.h"

namespace fastif {
namespace {

constexpr float kLowest = -64.0f;  // bounds stay normal numbers, and above smaller probabilities

template <class L, class T>
FASTIF_INLINE void exact_row_body(const T* row, int64_t classes, SoftmaxRow* out) {
  *out = softmax_row<L>(row, classes);
}
FASTIF_LEVELS(exact_row, exact_row_body)

// bounds = softmax of each row in float, written in whole vectors: up to 15 floats past each row,
// which the next one overwrites. sums[i] is not finite where the row has NaN or +inf or is -inf
// throughout. Nothing past logits + readable is read.
template <class L, class T>
FASTIF_INLINE void softmax_rows_body(const T* logits, int64_t rows, int64_t classes,
                                     int64_t readable, float* bounds, float* maxima, float* sums) {
  using V = typename L::f32;
  constexpr int kLanes = L::lanes;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  // The last vector of a row overlaps the one before it, and counts its new lanes only. A row
  // shorter than a vector is padded.
  const int64_t whole = classes / kLanes * kLanes, last = classes - kLanes;
  typename L::i32 lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = logits + i * classes;
    float* out = bounds + i * classes;
    float max, sum;
    auto exp_of = [&](V x) __attribute__((always_inline)) {
      V d = x - max;
      d = d < kLowest ? V{} + kLowest : d;  // keeps NaN
      return vexp_f32<L>(d);
    };
    if (whole == 0) {
      V x;
      if (i * classes + kLanes <= readable) {
        x = load_f32<L>(row);
      } else {
        float lanes[kLanes];
        for (int j = 0; j < kLanes; ++j) lanes[j] = j < classes ? to_float(row[j]) : 0.0f;
        x = load_f32<L>(lanes);
      }
      x = lane < int32_t(classes) ? x : V{} - kInfinity;
      max = max_f32<L::width>(x);
      const V e = lane < int32_t(classes) ? exp_of(x) : V{};
      sum = sum_f32<L::width>(e);
      store_vector(out, e * (1.0f / sum));
    } else {
      V m = load_f32<L>(row + last);
      for (int64_t j = 0; j < whole; j += kLanes) {
        const V x = load_f32<L>(row + j);
        m = x > m ? x : m;
      }
      max = max_f32<L::width>(m);
      V total{};
      for (int64_t j = 0; j < whole; j += kLanes) {
        const V e = exp_of(load_f32<L>(row + j));
        store_vector(out + j, e);
        total += e;
      }
      if (whole < classes) {
        const V e = exp_of(load_f32<L>(row + last));
        store_vector(out + last, e);
        total += lane >= int32_t(whole - last) ? e : V{};
      }
      sum = sum_f32<L::width>(total);
      const float inverse = 1.0f / sum;
      for (int64_t j = 0; j < classes; j += kLanes)
        store_vector(out + j, load_f32<L>(out + j) * inverse);
    }
    maxima[i] = max;
    sums[i] = sum;
  }
}
FASTIF_LEVELS(softmax_rows, softmax_rows_body)

// Rows of doubles less their maximum, as floats.
FASTIF_CLONES void centre_rows(const double* logits, int64_t rows, int64_t classes, float* centred,
                               double* maxima) {
  for (int64_t i = 0; i < rows; ++i) {
    const double* row = logits + i * classes;
    double max = row[0];
    for (int64_t j = 1; j < classes; ++j) max = row[j] > max ? row[j] : max;
    for (int64_t j = 0; j < classes; ++j) centred[i * classes + j] = float(row[j] - max);
    maxima[i] = max;
  }
}

template <class T>
class LogitSource {
 public:
  // Where there may be more finalists than rows, each row's exact softmax is computed once here.
  // (2000 rows of 150,000 classes, k = 4: 4 s instead of 180 s.)
  LogitSource(const T* logits, int64_t n, const Draw& draw, const Pool& pool)
      : logits_(logits), n_(n), classes_(draw.classes) {
    if (draw.classes * (draw.k + 1) < n) return;
    rows_.resize(n);
    const int64_t block = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, classes_));
    parallel_tasks(pool, ceil_div(n, block), [&](int64_t index) {
      for (int64_t i = index * block; i < std::min(n, (index + 1) * block); ++i)
        exact_row(logits + i * classes_, classes_, &rows_[i]);
    });
  }

  struct Tile {
    int64_t row;
    std::vector<float> centred, maxima, sums;
    std::vector<double> wide_maxima;
  };

  int64_t load(Tile& tile, int64_t row, int64_t rows, float* bounds) const {
    int64_t skipped = 0;
    const T* logits = logits_ + row * classes_;
    tile.row = row;
    tile.maxima.resize(rows);
    tile.sums.resize(rows);
    if constexpr (std::is_same_v<T, double>) {
      tile.centred.resize(rows * classes_);
      tile.wide_maxima.resize(rows);
      centre_rows(logits, rows, classes_, tile.centred.data(), tile.wide_maxima.data());
      softmax_rows(static_cast<const float*>(tile.centred.data()), rows, classes_, rows * classes_,
                   bounds, tile.maxima.data(), tile.sums.data());
    } else {
      softmax_rows(logits, rows, classes_, (n_ - row) * classes_, bounds, tile.maxima.data(),
                   tile.sums.data());
    }
    for (int64_t i = 0; i < rows; ++i)
      if (!std::isfinite(tile.sums[i])) skipped += irregular(row + i, bounds + i * classes_);
    return skipped;
  }

  double log_unit(int64_t) const { return 0; }
  double log_size(const Tile& tile, int64_t i, int64_t y) const {
    const double logit = to_float(logits_[(tile.row + i) * classes_ + y]);
    double max = tile.maxima[i];
    if constexpr (std::is_same_v<T, double>) max = tile.wide_maxima[i];
    return logit - max - double(std::log(tile.sums[i]));
  }
  double log_key(const Candidate& candidate, int64_t y) const {
    const T* logits = logits_ + candidate.row * classes_;
    SoftmaxRow row;
    if (rows_.empty())
      exact_row(logits, classes_, &row);
    else
      row = rows_[candidate.row];
    return row.log_probability(to_float(logits[y])) - exact_log(candidate.arrival);
  }
  // The float sum of softmax_rows: 1e-5 for its terms, 1e-8 for each addition.
  double accuracy() const { return 1e-5 + 1e-8 * double(classes_); }

  int64_t first_infinite() const { return infinite_ == n_ ? -1 : infinite_.load(); }

 private:
  // Whether the row is to be skipped.
  bool irregular(int64_t row, float* bounds) const {
    SoftmaxRow exact;
    exact_row(logits_ + row * classes_, classes_, &exact);
    std::fill(bounds, bounds + classes_, 0.0f);
    if (exact.kind == RowKind::kUndefined) return true;
    int64_t first = infinite_;
    while (row < first && !infinite_.compare_exchange_weak(first, row)) {
    }
    return false;
  }

  const T* logits_;
  int64_t n_, classes_;
  std::vector<SoftmaxRow> rows_;
  mutable std::atomic<int64_t> infinite_{n_};
};

}  // namespace

template <class T>
int64_t class_multinomial_cpu(const T* logits, int64_t n, const Draw& draw, const Sample& out,
                              int64_t* skipped, const Pool& pool) {
  const LogitSource<T> source(logits, n, draw, pool);
  *skipped = draw_sample(source, draw, n, out, pool);
  return source.first_infinite();
}

template int64_t class_multinomial_cpu(const float*, int64_t, const Draw&, const Sample&, int64_t*,
                                       const Pool&);
template int64_t class_multinomial_cpu(const double*, int64_t, const Draw&, const Sample&, int64_t*,
                                       const Pool&);
template int64_t class_multinomial_cpu(const Half*, int64_t, const Draw&, const Sample&, int64_t*,
                                       const Pool&);
template int64_t class_multinomial_cpu(const BFloat16*, int64_t, const Draw&, const Sample&,
                                       int64_t*, const Pool&);

}  // namespace fastif
