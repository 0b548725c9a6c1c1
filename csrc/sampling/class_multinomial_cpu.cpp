#include "sampling/class_multinomial.h"

#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "common/clones.h"
#include "common/simd.h"
#include "common/vexp.h"
#include "sampling/softmax_row.h"

namespace fastif {
namespace {

constexpr float kLowest = -64.0f;  // bounds stay normal numbers, and above smaller probabilities

template <class T>
FASTIF_CLONES void exact_row(const T* row, int64_t classes, SoftmaxRow* out) {
  *out = softmax_row(row, classes);
}

// bounds = softmax of each row in float, written in whole vectors: up to 15 floats past each row,
// which the next one overwrites. sums[i] is not finite where the row has NaN or +inf or is -inf
// throughout. Nothing past logits + readable is read.
template <class T>
FASTIF_CLONES void softmax_rows(const T* logits, int64_t rows, int64_t classes, int64_t readable,
                                float* bounds, float* maxima, float* sums) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  if (classes < 16) {
    const i32x16 used = lane < int32_t(classes);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = i * classes;
      f32x16 x = at + 16 <= readable ? load(logits + at) : load_partial(logits + at, classes);
      x = used ? x : f32x16{} - kInfinity;
      const float max = max_lanes(x);
      f32x16 d = x - max;
      d = d < kLowest ? f32x16{} + kLowest : d;
      const f32x16 e = used ? vexp(d) : f32x16{};
      const float sum = sum_lanes(e);
      store(bounds + at, e * (1.0f / sum));
      maxima[i] = max;
      sums[i] = sum;
    }
    return;
  }
  // A last vector that overlaps the one before it counts its new lanes only.
  const int64_t whole = classes / 16 * 16, last = classes - 16;
  const i32x16 is_new = lane >= int32_t(whole - last);
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = logits + i * classes;
    float* out = bounds + i * classes;
    f32x16 m = load(row + last);
    for (int64_t j = 0; j < whole; j += 16) m = vmax(load(row + j), m);
    const float max = max_lanes(m);
    auto exp_at = [&](int64_t j) __attribute__((always_inline)) {
      f32x16 d = load(row + j) - max;
      d = d < kLowest ? f32x16{} + kLowest : d;
      const f32x16 e = vexp(d);
      store(out + j, e);
      return e;
    };
    f32x16 total{};
    for (int64_t j = 0; j < whole; j += 16) total += exp_at(j);
    if (whole < classes) {
      const f32x16 e = exp_at(last);
      total += is_new ? e : f32x16{};
    }
    const float sum = sum_lanes(total), inverse = 1.0f / sum;
    for (int64_t j = 0; j < classes; j += 16) store(out + j, load(out + j) * inverse);
    maxima[i] = max;
    sums[i] = sum;
  }
}

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
  LogitSource(const T* logits, int64_t n, int64_t classes)
      : logits_(logits), n_(n), classes_(classes) {}

  struct Tile {
    int64_t row;
    std::vector<float> centred, maxima, sums;
    std::vector<double> wide_maxima;
  };

  void load(Tile& tile, int64_t row, int64_t rows, float* bounds) const {
    const T* logits = logits_ + row * classes_;
    tile.row = row;
    tile.maxima.resize(rows);
    tile.sums.resize(rows);
    if constexpr (std::is_same_v<T, double>) {
      tile.centred.resize(rows * classes_);
      tile.wide_maxima.resize(rows);
      centre_rows(logits, rows, classes_, tile.centred.data(), tile.wide_maxima.data());
      softmax_rows(tile.centred.data(), rows, classes_, rows * classes_, bounds, tile.maxima.data(),
                   tile.sums.data());
    } else {
      softmax_rows(logits, rows, classes_, (n_ - row) * classes_, bounds, tile.maxima.data(),
                   tile.sums.data());
    }
    for (int64_t i = 0; i < rows; ++i)
      if (!std::isfinite(tile.sums[i])) irregular(row + i, bounds + i * classes_);
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
    exact_row(logits, classes_, &row);
    return row.log_probability(to_float(logits[y])) - std::log(candidate.arrival);
  }
  // The float sum of softmax_rows: 1e-5 for its terms, 1e-8 for each addition.
  double accuracy() const { return 1e-5 + 1e-8 * double(classes_); }

  int64_t skipped() const { return skipped_; }
  int64_t first_infinite() const { return infinite_ == n_ ? -1 : infinite_.load(); }

 private:
  void irregular(int64_t row, float* bounds) const {
    SoftmaxRow exact;
    exact_row(logits_ + row * classes_, classes_, &exact);
    std::fill(bounds, bounds + classes_, 0.0f);
    if (exact.kind == RowKind::kUndefined) {
      ++skipped_;
    } else {
      int64_t first = infinite_;
      while (row < first && !infinite_.compare_exchange_weak(first, row)) {
      }
    }
  }

  const T* logits_;
  int64_t n_, classes_;
  mutable std::atomic<int64_t> skipped_{0}, infinite_{n_};
};

}  // namespace

template <class T>
int64_t class_multinomial_cpu(const T* logits, int64_t n, const Draw& draw, const Sample& out,
                              int64_t* skipped, const Pool& pool) {
  const LogitSource<T> source(logits, n, draw.classes);
  draw_sample(source, draw, n, out, pool);
  *skipped = source.skipped();
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
