#include "kmeans/kmeans_update.h"

#include "tests/native_test.h"

using namespace fastif;
using namespace fastif::test;

namespace {

template <class T>
void check(int64_t n, int64_t d, int64_t K, bool weighted, double tolerance) {
  const auto x = normal<T>(n * d, 1), weight = normal<T>(n, 2);
  std::vector<int64_t> labels(n), want_counts(K);
  std::vector<double> want(K * d), size(K * d);
  std::mt19937 engine(3);
  for (int64_t i = 0; i < n; ++i) {
    labels[i] = int64_t(engine() % unsigned(K + 1)) - 1;
    if (labels[i] < 0) continue;
    ++want_counts[labels[i]];
    for (int64_t k = 0; k < d; ++k) {
      const double term = weighted ? double(weight[i]) * x[i * d + k] : double(x[i * d + k]);
      want[labels[i] * d + k] += term;
      size[labels[i] * d + k] += std::abs(term);
    }
  }
  auto run = [&](const Pool& pool) {
    std::vector<T> sums(K * d, T(-7));
    std::vector<int64_t> counts(K, -7);
    const int64_t bad = kmeans_update_cpu(
        KMeansUpdate<T>{n, d, K, x.data(), labels.data(), weighted ? weight.data() : nullptr,
                        sums.data(), counts.data()},
        pool);
    EXPECT(bad == -1, "row %ld was refused", long(bad));
    return std::make_pair(sums, counts);
  };
  const auto [sums, counts] = run(threaded_pool());
  EXPECT(run(reversed_pool()) == std::make_pair(sums, counts), "the pool changed the result");
  EXPECT(counts == want_counts, "wrong counts");
  for (int64_t i = 0; i < K * d; ++i) {
    EXPECT(std::abs(sums[i] - want[i]) <= tolerance * (size[i] + 1e-30), "sum %ld: %g, expected %g",
           long(i), double(sums[i]), want[i]);
  }
  if (n > 0) {
    for (int64_t label : {int64_t(-2), K}) {
      labels[n - 1] = label;
      std::vector<T> none(K * d);
      std::vector<int64_t> no_counts(K);
      const int64_t bad = kmeans_update_cpu(
          KMeansUpdate<T>{n, d, K, x.data(), labels.data(), nullptr, none.data(), no_counts.data()},
          threaded_pool());
      EXPECT(bad == n - 1, "label %ld went unnoticed", long(label));
    }
  }
}

}  // namespace

int main() {
  for (bool weighted : {false, true}) {
    for (int64_t d : {0, 1, 15, 16, 37, 600}) {
      for (int64_t n : {0, 1, 5, 333}) {
        for (int64_t K : {1, 4, 500}) {
          check<float>(n, d, K, weighted, 1e-5);
          check<double>(n, d, K, weighted, 1e-13);
        }
      }
    }
    check<float>(9000, 19, 2, weighted, 1e-5);
    check<double>(9000, 19, 2, weighted, 1e-13);
  }
  std::puts("kmeans_update: ok");
}
