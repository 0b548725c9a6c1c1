#include "hvp/linear_softmax_hvp.h"

#include <algorithm>
#include <array>

#include "common/clones.h"
#include "tests/native_test.h"

using namespace fastif;
using namespace fastif::test;

namespace {

struct Case {
  int64_t n, d, C, R;
  bool bias, weighted;
};

// The sum over rows, in double.
template <class T>
std::vector<double> expected(const Case& c, const std::vector<T>& x, const std::vector<T>& probs,
                             const std::vector<accumulate_t<T>>& v,
                             const std::vector<accumulate_t<T>>& w) {
  const int64_t columns = c.d + c.bias;
  std::vector<double> want(c.R * c.C * columns, 0.0);
  for (int64_t i = 0; i < c.n; ++i) {
    std::vector<double> row(columns, 1.0), z(c.C), p(c.C);
    for (int64_t k = 0; k < c.d; ++k) row[k] = to_float(x[i * c.d + k]);
    for (int64_t j = 0; j < c.C; ++j) p[j] = to_float(probs[i * c.C + j]);
    for (int64_t r = 0; r < c.R; ++r) {
      double dot = 0;
      for (int64_t j = 0; j < c.C; ++j) {
        z[j] = 0;
        for (int64_t k = 0; k < columns; ++k) z[j] += row[k] * v[(r * c.C + j) * columns + k];
        dot += p[j] * z[j];
      }
      for (int64_t j = 0; j < c.C; ++j) {
        const double u = (c.weighted ? w[i] : 1) * p[j] * (z[j] - dot);
        for (int64_t k = 0; k < columns; ++k) want[(r * c.C + j) * columns + k] += u * row[k];
      }
    }
  }
  return want;
}

template <class T>
void check(const Case& c, double tolerance) {
  using A = accumulate_t<T>;
  const int64_t elements = c.R * c.C * (c.d + c.bias);
  const auto x = random_values<T>(c.n * c.d, 1);
  auto probs = random_values<T>(c.n * c.C, 2);
  for (auto& p : probs) p = from_float<T>(std::abs(float(to_float(p))) / float(c.C));
  const auto v = normal<A>(elements, 3), w = normal<A>(c.n, 4);
  auto run = [&](const Pool& pool) {
    std::vector<A> result(elements, A(7));
    linear_softmax_hvp_cpu(
        LinearSoftmaxHvp<T>{c.n, c.d, c.C, c.R, c.bias, x.data(), probs.data(), v.data(),
                            c.weighted ? w.data() : nullptr, result.data()},
        pool);
    return result;
  };
  const auto got = run(threaded_pool());
  EXPECT(run(reversed_pool()) == got, "the pool changed the result");
  const auto want = expected(c, x, probs, v, w);
  double largest = 1;
  for (double value : want) largest = std::max(largest, std::abs(value));
  for (int64_t i = 0; i < elements; ++i)
    EXPECT(std::abs(got[i] - want[i]) <= tolerance * largest,
           "n %ld, d %ld, C %ld, R %ld: element %ld is %g, expected %g", long(c.n), long(c.d),
           long(c.C), long(c.R), long(i), double(got[i]), want[i]);
}

// Probabilities below the least normal number count as zero.
void check_denormals() {
#if defined(__SSE2__)
  const int64_t n = 150, d = 20, C = 10;
  const std::vector<float> x(n * d, 1.0f), probs(n * C, 0x1p-130f), v = normal<float>(C * d, 1);
  std::vector<float> result(C * d, 7.0f);
  linear_softmax_hvp_cpu(LinearSoftmaxHvp<float>{n, d, C, 1, false, x.data(), probs.data(),
                                                 v.data(), nullptr, result.data()},
                         threaded_pool());
  for (float value : result) EXPECT(value == 0, "%g", double(value));
#endif
}

void check_shapes() {
  for (bool bias : {false, true}) {
    for (const auto& [n, d, C, R] : {std::array<int64_t, 4>{0, 3, 4, 1},
                                     {5, 0, 3, 1},
                                     {1, 1, 1, 1},
                                     {143, 15, 2, 1},
                                     {145, 16, 10, 1},
                                     {300, 17, 10, 3},
                                     {600, 128, 5, 1},
                                     {50, 300, 20, 2},
                                     {40, 5, 130, 1},
                                     {3000, 3, 2, 1}}) {
      const Case c{n, d, C, R, bias, d % 2 == 1};
      check<float>(c, 1e-5);
      check<double>(c, 1e-13);
      check<Half>(c, 1e-5);
      check<BFloat16>(c, 1e-5);
    }
  }
}

}  // namespace

int main() {
  const SimdLevel machine = simd_level();
  for (SimdLevel level : {SimdLevel::kBase, SimdLevel::kV3, SimdLevel::kV4}) {
    if (level > machine) continue;
    simd_level() = level;
    check_shapes();
    check_denormals();
  }
  std::puts("linear_softmax_hvp: ok");
}
