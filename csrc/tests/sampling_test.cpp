// The sampling kernels against the definition written as plain loops: every key in double, sorted.
#include <algorithm>
#include <limits>
#include <tuple>

#include "common/numeric_types.h"
#include "common/philox.h"
#include "common/simd_levels.h"
#include "sampling/bottom_k.h"
#include "sampling/class_multinomial.h"
#include "sampling/curvature_multinomial.h"
#include "sampling/gate.h"
#include "sampling/merge_samples.h"
#include "tests/native_test.h"

using namespace fastif;
using namespace fastif::test;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

struct Result {
  std::vector<int64_t> rows;
  std::vector<float> keys, threshold;
  int64_t skipped = 0, bad = -1;

  Result(int64_t Y, int64_t k) : rows(Y * k), keys(Y * k), threshold(Y) {}
  Sample data() { return {rows.data(), keys.data(), threshold.data()}; }
  ConstSample view() const { return {rows.data(), keys.data(), threshold.data()}; }
  bool operator==(const Result&) const = default;
};

// log_size: [n, Y]
Result definition(const std::vector<double>& log_size, int64_t n, const Draw& draw) {
  const int64_t Y = draw.classes, k = draw.k;
  Result out(Y, k);
  for (int64_t y = 0; y < Y; ++y) {
    std::vector<std::pair<float, int64_t>> finals;
    for (int64_t i = 0; i < n; ++i) {
      if (log_size[i * Y + y] == -kInf) continue;
      const int64_t row = int64_t(draw.row_offset) + i;
      double arrival = 0;
      for (int64_t j = 0; j < (draw.replacement ? k + 1 : 1); ++j) {
        arrival += exponential(uniform(draw.seed, uint64_t(row * Y + y), uint32_t(j)));
        finals.emplace_back(-float(log_size[i * Y + y] - std::log(arrival)), row);
      }
    }
    std::sort(finals.begin(), finals.end());
    for (int64_t j = 0; j <= k; ++j) {
      const bool there = j < int64_t(finals.size());
      const float key = there ? -finals[j].first : -std::numeric_limits<float>::infinity();
      if (j == k) {
        out.threshold[y] = key;
      } else {
        out.rows[y * k + j] = there ? finals[j].second : -1;
        out.keys[y * k + j] = key;
      }
    }
  }
  return out;
}

void expect_equal(const Result& got, const Result& want, const char* what) {
  EXPECT(got.rows == want.rows, "%s: other rows than the definition", what);
  for (size_t i = 0; i < got.keys.size(); ++i)
    EXPECT(got.keys[i] == want.keys[i] || std::abs(got.keys[i] - want.keys[i]) <
                                              2e-7f * std::max(1.0f, std::abs(want.keys[i])),
           "%s: key %g, expected %g", what, double(got.keys[i]), double(want.keys[i]));
  for (size_t i = 0; i < got.threshold.size(); ++i)
    EXPECT(got.threshold[i] == want.threshold[i] ||
               std::abs(got.threshold[i] - want.threshold[i]) <
                   2e-7f * std::max(1.0f, std::abs(want.threshold[i])),
           "%s: threshold %g, expected %g", what, double(got.threshold[i]),
           double(want.threshold[i]));
}

// Runs with two pools, and in two chunks that are merged: the same bits each time.
template <class Run>
Result agreed(int64_t Y, const Draw& draw, int64_t n, bool chunked, Run&& run) {
  Result whole(Y, draw.k), again(Y, draw.k);
  run(0, n, draw.row_offset, whole, threaded_pool());
  run(0, n, draw.row_offset, again, reversed_pool());
  EXPECT(whole == again, "the pool changed the result");
  if (chunked) {
    const int64_t cut = n / 3;
    Result a(Y, draw.k), b(Y, draw.k), merged(Y, draw.k);
    run(0, cut, draw.row_offset, a, reversed_pool());
    run(cut, n - cut, draw.row_offset + uint64_t(cut), b, reversed_pool());
    merge_samples_cpu(a.view(), b.view(), Y, draw.k, merged.data());
    merged.skipped = a.skipped + b.skipped;
    EXPECT(merged == whole, "merged chunks differ from the whole");
  }
  return whole;
}

template <class T>
void check_classes(int64_t n, int64_t Y, int64_t k, bool replacement, uint64_t row_offset) {
  auto logits = normal<float>(n * Y, unsigned(n + Y));
  for (int64_t i = 0; i < n * Y; ++i) {
    logits[i] *= 4;
    if (i % 7 == 3) logits[i] = -std::numeric_limits<float>::infinity();
    if (i % 11 == 5) logits[i] -= 200;  // far below what a float probability holds
  }
  int64_t undefined = 0;
  for (int64_t i = 0; i < n && Y > 0; i += 13) {
    logits[i * Y + i % Y] = std::numeric_limits<float>::quiet_NaN();
    ++undefined;
  }
  if (Y > 0 && n > 1) {
    for (int64_t y = 0; y < Y; ++y) logits[Y + y] = -std::numeric_limits<float>::infinity();
    ++undefined;
  }
  std::vector<T> stored(n * Y);
  for (int64_t i = 0; i < n * Y; ++i) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      stored[i] = BFloat16{uint16_t(std::bit_cast<uint32_t>(logits[i]) >> 16)};
      if (std::isnan(logits[i])) stored[i] = BFloat16{0x7fc0};
    } else {
      stored[i] = T(logits[i]);
    }
  }
  std::vector<double> log_size(n * Y);
  for (int64_t i = 0; i < n; ++i) {
    double max = -kInf, sum = 0;
    for (int64_t y = 0; y < Y; ++y) max = std::max(max, double(to_float(stored[i * Y + y])));
    for (int64_t y = 0; y < Y; ++y) sum += std::exp(to_float(stored[i * Y + y]) - max);
    for (int64_t y = 0; y < Y; ++y) {
      const double value = to_float(stored[i * Y + y]) - max - std::log(sum);
      log_size[i * Y + y] = std::isnan(sum) ? -kInf : value;
      // A maximum is lost beside a NaN that comes after it.
      for (int64_t z = 0; z < Y; ++z)
        if (std::isnan(double(to_float(stored[i * Y + z])))) log_size[i * Y + y] = -kInf;
    }
  }
  const Draw draw{Y, k, replacement, 77, row_offset};
  const Result got = agreed(
      Y, draw, n, true,
      [&](int64_t row, int64_t rows, uint64_t offset, Result& out, const Pool& pool) {
        Draw chunk = draw;
        chunk.row_offset = offset;
        // An exact copy, so that the sanitizer sees a read past the last row.
        const std::vector<T> exact(stored.begin() + row * Y, stored.begin() + (row + rows) * Y);
        out.bad = class_multinomial_cpu(exact.data(), rows, chunk, out.data(), &out.skipped, pool);
      });
  expect_equal(got, definition(log_size, n, draw), "class_multinomial");
  EXPECT(got.bad == -1, "finite rows were called infinite");
  EXPECT(got.skipped == undefined, "%ld rows skipped, expected %ld", long(got.skipped),
         long(undefined));
}

template <class T>
void check_weights(int64_t n, int64_t R, int64_t k, bool replacement, bool transposed,
                   double unit) {
  const auto values = normal<double>(n * R, 5);
  std::vector<T> weights(n * R);
  std::vector<double> log_size(n * R);
  const int64_t line = transposed ? 1 : n, step = transposed ? R : 1;
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      const T w = (i + r) % 5 == 0 ? T(0) : T(unit * std::exp(3 * values[r * n + i]));
      weights[r * line + i * step] = w;
      log_size[i * R + r] = std::log(double(w));
    }
  }
  const Draw draw{R, k, replacement, 78, 3};
  const Result got =
      agreed(R, draw, n, true,
             [&](int64_t row, int64_t rows, uint64_t offset, Result& out, const Pool& pool) {
               Draw chunk = draw;
               chunk.row_offset = offset;
               const Weights<T> w{weights.data() + row * step, R, rows, line, step};
               EXPECT(bottom_k_cpu(w, chunk, out.data(), pool) == -1, "valid weights were refused");
             });
  expect_equal(got, definition(log_size, n, draw), "bottom_k");
  if (n * R > 0) {
    weights[n * R / 2] = T(-1);
    Result out(R, k);
    const int64_t at = n * R / 2, r = transposed ? at % R : at / n,
                  i = transposed ? at / R : at % n;
    EXPECT(bottom_k_cpu(Weights<T>{weights.data(), R, n, line, step}, draw, out.data(),
                        threaded_pool()) == r * n + i,
           "a negative weight was not found");
  }
}

void check_curvature(int64_t n, int64_t Y, int64_t m, float floor) {
  auto logits = normal<float>(n * Y, 9);
  for (auto& x : logits) x *= 10;
  if (n > 2) logits[2 * Y] = std::numeric_limits<float>::quiet_NaN();
  std::vector<double> scale(n), log_size(n);
  for (int64_t i = 0; i < n; ++i) scale[i] = double(i % 17);
  const CurvatureSizes<float> task{logits.data(), n, Y, scale.data()};
  std::vector<float> sizes(n), again(n);
  EXPECT(curvature_sizes_cpu(task, sizes.data(), threaded_pool()).row == -1, "refused");
  EXPECT(curvature_sizes_cpu(task, again.data(), reversed_pool()).row == -1, "refused");
  EXPECT(sizes == again, "the pool changed the sizes");
  for (int64_t i = 0; i < n; ++i) {
    double max = -kInf, sum = 0, size = 0;
    int64_t top = 0;
    for (int64_t y = 0; y < Y; ++y) {
      if (logits[i * Y + y] > max) top = y, max = logits[i * Y + y];
    }
    for (int64_t y = 0; y < Y; ++y) sum += std::exp(logits[i * Y + y] - max);
    double others = 0;
    for (int64_t y = 0; y < Y; ++y)
      if (y != top) others += std::exp(logits[i * Y + y] - max) / sum;
    for (int64_t y = 0; y < Y; ++y) {
      const double p = std::exp(logits[i * Y + y] - max) / sum;
      size += p * (y == top ? others : 1 - p);
    }
    if (std::isnan(size)) size = 0;
    EXPECT(std::abs(sizes[i] - size * scale[i]) <= 2e-6 * size * scale[i] + 2e-45,
           "row %ld: size %g, expected %g", long(i), double(sizes[i]), size * scale[i]);
    log_size[i] = std::log(double(sizes[i] + floor));
  }
  const Draw draw{1, m, false, 79, 1000};
  const Result got = agreed(
      1, draw, n, true,
      [&](int64_t row, int64_t rows, uint64_t offset, Result& out, const Pool& pool) {
        Draw chunk = draw;
        chunk.row_offset = offset;
        const CurvatureSizes<float> part{logits.data() + row * Y, rows, Y, scale.data() + row};
        EXPECT(
            curvature_multinomial_cpu(part, floor, chunk, out.data(), &out.skipped, pool).row == -1,
            "refused");
      });
  expect_equal(got, definition(log_size, n, draw), "curvature_multinomial");
  EXPECT(got.skipped == (n > 2), "the row of NaN was not counted");
  if (n > 4) {
    Result out(1, m);
    logits[4 * Y] = std::numeric_limits<float>::infinity();
    BadRow bad =
        curvature_multinomial_cpu(task, floor, draw, out.data(), &out.skipped, threaded_pool());
    EXPECT(bad.row == 4 && bad.infinite_logit, "infinite row 4 was called %ld", long(bad.row));
    scale[3] = -1;
    bad = curvature_sizes_cpu(task, sizes.data(), threaded_pool());
    EXPECT(bad.row == 3 && !bad.infinite_logit, "bad scale 3 was called %ld", long(bad.row));
  }
}

// The rows that the engine probes for its first floors are far from typical: its guess is too high,
// and a second pass must mend it.
void check_misleading_probe(bool replacement) {
  const int64_t n = 8192, k = 200;
  std::vector<float> weights(n);
  std::vector<double> log_size(n);
  for (int64_t i = 0; i < n; ++i) {
    weights[i] = i % 64 < 4 ? 1.0f : 1e-6f;
    log_size[i] = std::log(double(weights[i]));
  }
  const Draw draw{1, k, replacement, 80, 0};
  const Result got =
      agreed(1, draw, n, false, [&](int64_t, int64_t, uint64_t, Result& out, const Pool& pool) {
        const Weights<float> w{weights.data(), 1, n, n, 1};
        EXPECT(bottom_k_cpu(w, draw, out.data(), pool) == -1, "valid weights were refused");
      });
  expect_equal(got, definition(log_size, n, draw), "bottom_k with a misleading probe");
}

// Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
void check_philox() {
  const auto zero = philox4x32({{0, 0, 0, 0}}, 0, 0);
  const uint32_t want_zero[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  const uint32_t ones = 0xffffffff;
  const auto full = philox4x32({{ones, ones, ones, ones}}, ones, ones);
  const uint32_t want_full[4] = {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd};
  const auto pi =
      philox4x32({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0xa4093822, 0x299f31d0);
  const uint32_t want_pi[4] = {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1};
  for (int w = 0; w < 4; ++w) {
    EXPECT(zero.word[w] == want_zero[w], "word %d", w);
    EXPECT(full.word[w] == want_full[w], "word %d", w);
    EXPECT(pi.word[w] == want_pi[w], "word %d", w);
  }
}

// The gate's words are those of the scalar generator, also where the counter's upper half turns.
void check_gate() {
  for (uint64_t first :
       {uint64_t{0}, uint64_t{5}, (uint64_t{1} << 28) - 1, (uint64_t{1} << 57) + 1})
    for (int64_t classes : {1, 3, 16, 17, 100}) {
      const int64_t blocks = 3, elements = blocks * kGateBlock;
      const std::vector<float> bounds(elements, 1.0f);
      std::vector<float> limits(classes + kGateLanes);
      for (size_t i = 0; i < limits.size(); ++i)
        limits[i] = float(kGateUnit) * float(int64_t(i) % classes + 1) / float(classes);
      std::vector<uint32_t> index(elements), word(elements);
      const int64_t phase = 2 % classes;
      const int64_t hits = gate(99, first, blocks, bounds.data(), limits.data(), classes, phase,
                                index.data(), word.data());
      int64_t h = 0;
      for (int64_t i = 0; i < elements; ++i) {
        const uint32_t want = element_word(99, first * kGateBlock + uint64_t(i), 0, 0);
        if (!(float(want >> 1) <= limits[(phase + i) % classes])) continue;
        EXPECT(h < hits && index[h] == uint32_t(i) && word[h] == want, "hit %ld", long(h));
        ++h;
      }
      EXPECT(h == hits, "%ld hits, expected %ld", long(hits), long(h));
    }
}

void check_all() {
  check_philox();
  check_gate();
  check_misleading_probe(false);
  check_misleading_probe(true);
  for (bool replacement : {false, true}) {
    check_classes<float>(0, 4, 3, replacement, 0);
    check_classes<float>(9, 0, 3, replacement, 0);
    check_classes<float>(40, 5, 0, replacement, 0);
    check_classes<float>(40, 5, 60, replacement, 1);
    check_classes<float>(5000, 10, 20, replacement, uint64_t{1} << 40);
    check_classes<float>(900, 16, 30, replacement, 7);
    check_classes<float>(500, 33, 9, replacement, 7);
    check_classes<float>(60, 2500, 2, replacement, 3);
    check_classes<double>(2000, 7, 20, replacement, 5);
    check_classes<double>(300, 40, 20, replacement, 5);
    check_classes<BFloat16>(2000, 10, 20, replacement, 5);
    for (bool transposed : {false, true}) {
      check_weights<float>(0, 2, 3, replacement, transposed, 1);
      check_weights<float>(5000, 3, 40, replacement, transposed, 1e-30);
      check_weights<double>(3000, 5, 10, replacement, transposed, 1e290);
      check_weights<double>(1000, 1, 10, replacement, transposed, 1e-310);
      check_weights<double>(20, 70, 30, replacement, transposed, 1e-200);
    }
  }
  for (float floor : {0.0f, 0.25f, 1e30f}) {
    check_curvature(0, 3, 4, floor);
    check_curvature(3000, 10, 50, floor);
    check_curvature(100, 33, 200, floor);
    check_curvature(50, 1, 5, floor);
  }
}

}  // namespace

int main() {
  const SimdLevel machine = simd_level();
  for (SimdLevel level : {SimdLevel::kBase, SimdLevel::kV3, SimdLevel::kV4}) {
    if (level > machine) continue;
    simd_level() = level;
    check_all();
  }
  std::puts("sampling: ok");
}
