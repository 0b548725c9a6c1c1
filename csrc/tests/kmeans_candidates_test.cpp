#include "kmeans/kmeans_candidates.h"

#include <algorithm>

#include "tests/native_test.h"

using namespace fastif;
using namespace fastif::test;

namespace {

template <class T>
void check(int64_t n, int64_t d, int64_t L, bool weighted, double tolerance) {
  const auto x = normal<T>(n * d, 1), candidates = normal<T>(L * d, 2), weight = normal<T>(n, 3);
  std::vector<T> sqdist(n);
  for (int64_t i = 0; i < n; ++i) sqdist[i] = T(i % 5) * T(d);
  std::vector<double> want(L * n);
  for (int64_t l = 0; l < L; ++l) {
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < d; ++k) {
        const double delta = double(x[i * d + k]) - double(candidates[l * d + k]);
        sum += delta * delta;
      }
      want[l * n + i] = std::min(sum, double(sqdist[i]));
    }
  }
  std::vector<SimdLevel> levels{SimdLevel::kBase};
  if (simd_level() >= SimdLevel::kV3) levels.push_back(SimdLevel::kV3);
  if (simd_level() >= SimdLevel::kV4) levels.push_back(SimdLevel::kV4);
  for (SimdLevel level : levels) {
    auto run = [&](const Pool& pool) {
      std::vector<T> least(L * n, T(-7));
      std::vector<double> potential(L);
      kmeans_candidates_cpu(
          KMeansCandidates<T>{n, d, L, x.data(), candidates.data(), sqdist.data(),
                              weighted ? weight.data() : nullptr, least.data(), potential.data()},
          pool, level);
      return std::make_pair(least, potential);
    };
    const auto [least, potential] = run(threaded_pool());
    EXPECT(run(reversed_pool()) == std::make_pair(least, potential), "the pool changed the result");
    for (int64_t l = 0; l < L; ++l) {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) {
        const double got = least[l * n + i];
        EXPECT(std::abs(got - want[l * n + i]) <= tolerance * want[l * n + i],
               "n=%ld d=%ld l=%ld row %ld: %g, expected %g", long(n), long(d), long(l), long(i),
               got, want[l * n + i]);
        sum += (weighted ? double(weight[i]) : 1.0) * got;
      }
      EXPECT(close(potential[l], sum, 1e-12), "potential %g, expected %g", potential[l], sum);
    }
  }
}

}  // namespace

int main() {
  for (bool weighted : {false, true}) {
    for (int64_t n : {0, 1, 3, 4, 255, 600}) {
      for (int64_t d : {0, 1, 16, 67}) {
        for (int64_t L : {0, 1, 2, 3, 4, 9}) {
          check<float>(n, d, L, weighted, 1e-5);
          check<double>(n, d, L, weighted, 1e-13);
        }
      }
    }
  }
  std::puts("kmeans_candidates: ok");
}
