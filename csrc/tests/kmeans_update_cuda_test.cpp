#include "kmeans/kmeans_update_cuda.cu"

#include "common/device_sort_cuda.cu"
#include "kmeans/clusters_cuda.cu"
#include "tests/gpu_test.h"

using namespace fastif;
using namespace fastif::test;

namespace {

template <class A>
bool same_bits(A a, A b) {
  return std::memcmp(&a, &b, sizeof(A)) == 0 || (std::isnan(a) && std::isnan(b));
}

template <class T>
struct Case {
  using A = accumulate_t<T>;
  int64_t n, d, K;
  std::vector<T> x;
  std::vector<A> weight;
  std::vector<int64_t> labels;

  Case(int64_t n, int64_t d, int64_t K)
      : n(n), d(d), K(K), x(random_values<T>(n * d + 1, 1)), weight(normal<A>(n, 2)), labels(n) {
    std::mt19937 engine(3);
    for (auto& label : labels) label = int64_t(engine() % unsigned(K + 1)) - 1;
  }
  // x as a slice of a tensor that starts one element in, if `shifted`.
  KMeansUpdate<T> task(bool weighted, bool shifted, A* sums, int64_t* counts) const {
    return {n,    d,     K, x.data() + shifted, labels.data(), weighted ? weight.data() : nullptr,
            sums, counts};
  }
  auto on_gpu(bool weighted, bool shifted) const {
    std::vector<A> last_sums;
    const auto counts = on_simulated_gpus([&](const Gpu& gpu) {
      std::vector<A> sums(K * d, A(-7));
      std::vector<int64_t> counts(K, -7);
      kmeans_update_cuda(task(weighted, shifted, sums.data(), counts.data()), gpu);
      if (!last_sums.empty())
        for (size_t i = 0; i < sums.size(); ++i)
          EXPECT(same_bits(sums[i], last_sums[i]), "thread order changed sum %zu", i);
      last_sums = sums;
      return counts;
    });
    return std::make_pair(last_sums, counts);
  }
};

template <class T>
void compare(const Case<T>& given, bool weighted, bool shifted) {
  using A = accumulate_t<T>;
  std::vector<A> want(given.K * given.d);
  std::vector<int64_t> want_counts(given.K);
  EXPECT(kmeans_update_cpu(given.task(weighted, shifted, want.data(), want_counts.data()),
                           reversed_pool()) == -1,
         "a label was refused");
  const auto [sums, counts] = given.on_gpu(weighted, shifted);
  EXPECT(counts == want_counts, "n=%ld K=%ld: wrong counts", long(given.n), long(given.K));
  const double tolerance = sizeof(A) == 4 ? 1e-4 : 1e-12;  // near rounding: sums of n terms near 1
  for (size_t i = 0; i < sums.size(); ++i)
    EXPECT(weighted ? close(sums[i], want[i], tolerance) : same_bits(sums[i], want[i]),
           "n=%ld d=%ld K=%ld weighted=%d sum %zu: %.9g, expected %.9g", long(given.n),
           long(given.d), long(given.K), weighted, i, double(sums[i]), double(want[i]));
}

template <class T>
void check(int64_t n, int64_t d, int64_t K) {
  const Case<T> given(n, d, K);
  for (bool weighted : {false, true})
    for (bool shifted : {false, true}) compare(given, weighted, shifted);
}

// Labels outside [-1, K) make all counts -1 and all sums NaN.
void check_bad_labels(int64_t n) {
  for (int64_t bad : {int64_t(-2), int64_t(3), int64_t(1) << 40}) {
    Case<float> given(n, 5, 3);
    given.labels[n / 2] = bad;
    const auto [sums, counts] = given.on_gpu(false, false);
    for (int64_t count : counts)
      EXPECT(count == -1, "label %ld: count %ld", long(bad), long(count));
    for (float sum : sums) EXPECT(std::isnan(sum), "label %ld: sum %g", long(bad), double(sum));
  }
}

}  // namespace

int main() {
  for (int64_t d : {0, 1, 3, 4, 15, 16, 23, 24, 37, 140}) {
    for (int64_t n : {0, 1, 5, 83}) {
      for (int64_t K : {1, 4, 100}) check<float>(n, d, K);
    }
    check<double>(83, d, 4);
    check<Half>(83, d, 4);
    check<BFloat16>(83, d, 4);
  }
  for (int64_t K : {1, 2, 3}) {
    check<float>(5000, 1, K);
    check<float>(5003, 20, K);
    check<double>(3075, 10, K);
  }
  check<float>(5003, 7, 60);
  check<float>(6000, 4, 4000);  // more clusters than blocks
  // Clusters of exactly one and two pieces, of one row more, and empty ones around them.
  for (int64_t size : {1024, 1025, 2048, 2049}) {
    Case<float> given(2 * size + 3, 6, 9);
    for (int64_t i = 0; i < given.n; ++i) given.labels[i] = i < 3 ? -1 : i % 2 == 0 ? 2 : 6;
    compare(given, false, false);
  }
  Case<float> strange(40, 5, 3);
  for (int64_t i = 0; i < 40; i += 3) strange.x[i * 5 + i % 5] = i % 2 ? INFINITY : NAN;
  compare(strange, false, false);
  check_bad_labels(7);
  check_bad_labels(3000);
  check<float>(10, 3, 0);
  return 0;
}
