#include "kmeans/kmeans_assign.h"

#include <limits>

#include "tests/native_test.h"

using namespace fastif;
using namespace fastif::test;

namespace {

std::vector<SimdLevel> levels() {
  std::vector<SimdLevel> usable{SimdLevel::kBase};
  if (simd_level() >= SimdLevel::kV3) usable.push_back(SimdLevel::kV3);
  if (simd_level() >= SimdLevel::kV4) usable.push_back(SimdLevel::kV4);
  return usable;
}

template <class T>
T narrow(double value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return BFloat16{uint16_t(std::bit_cast<uint32_t>(float(value)) >> 16)};
  } else {
    return T(value);
  }
}

// Every level and pool against a float64 loop. Row 2 holds a NaN, centroid 1 an inf.
template <class T>
void check(int64_t n, int64_t d, int64_t K, bool spoiled, double tolerance) {
  using A = accumulate_t<T>;
  const auto values = normal<double>(n * d, 1);
  std::vector<T> x;
  for (double value : values) x.push_back(narrow<T>(value));
  auto centroids = normal<A>(K * d, 2);
  for (int64_t k = 0; k < d && K > 3; ++k) centroids[3 * d + k] = centroids[k];  // an exact tie
  const bool bad_row = spoiled && n > 2 && d > 0, bad_centroid = spoiled && K > 1 && d > 0;
  if (bad_row) x[2 * d + d / 2] = narrow<T>(std::numeric_limits<double>::quiet_NaN());
  if (bad_centroid) centroids[d + d - 1] = std::numeric_limits<A>::infinity();

  std::vector<int64_t> want(n);
  std::vector<double> least(n);
  for (int64_t i = 0; i < n; ++i) {
    want[i] = -1;
    for (int64_t j = 0; j < K && !(bad_row && i == 2); ++j) {
      double sum = 0;
      for (int64_t k = 0; k < d; ++k) {
        const double delta = double(to_float(x[i * d + k])) - double(centroids[j * d + k]);
        sum += delta * delta;
      }
      if (!(bad_centroid && j == 1) && (want[i] < 0 || sum < least[i])) {
        want[i] = j;
        least[i] = sum;
      }
    }
  }
  for (SimdLevel level : levels()) {
    for (const Pool& pool : {reversed_pool(), threaded_pool()}) {
      std::vector<int64_t> labels(n, -7);
      std::vector<A> sqdist(n);
      kmeans_assign_cpu(
          KMeansAssign<T>{n, d, K, x.data(), centroids.data(), labels.data(), sqdist.data()}, pool,
          level);
      EXPECT(labels == want, "n=%ld d=%ld K=%ld level=%d", long(n), long(d), long(K), int(level));
      for (int64_t i = 0; i < n; ++i) {
        EXPECT(want[i] < 0 ? std::isnan(sqdist[i])
                           : std::abs(sqdist[i] - least[i]) <= tolerance * least[i],
               "row %ld: %g, expected %g", long(i), double(sqdist[i]), least[i]);
      }
    }
  }
}

}  // namespace

int main() {
  for (bool spoiled : {false, true}) {
    for (int64_t K : {1, 2, 5, 8, 13, 24}) {
      for (int64_t n : {0, 1, 3, 16, 47, 48, 193, 400}) {
        check<float>(n, 1, K, spoiled, 1e-5);
        check<float>(n, 13, K, spoiled, 1e-5);
      }
      check<float>(70, 0, K, spoiled, 0);
      check<float>(70, 64, K, spoiled, 1e-5);
      check<float>(70, 523, K, spoiled, 1e-5);
      check<float>(50, 2500, K, spoiled, 1e-5);
      check<double>(70, 61, K, spoiled, 1e-13);
      check<double>(205, 300, K, spoiled, 1e-13);
      check<BFloat16>(205, 35, K, spoiled, 1e-5);
    }
  }
  for (int64_t d : {60, 128, 129, 300}) check<float>(50, d, 1100, true, 1e-5);
  check<double>(30, 300, 500, false, 1e-13);
  std::puts("kmeans_assign: ok");
}
