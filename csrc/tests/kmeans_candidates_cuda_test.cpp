#include "kmeans/kmeans_candidates_cuda.cu"

#include "tests/gpu_test.h"

using namespace fastif;
using namespace fastif::test;

namespace {

template <class T>
void check(int64_t n, int64_t d, int64_t L, bool weighted, bool shifted, double tolerance,
           bool on_one_multiprocessor = false) {
  using A = accumulate_t<T>;
  auto x = random_values<T>(n * d + 1, 1);
  const auto candidates = normal<A>(L * d, 2);
  auto weight = normal<A>(n, 3);
  std::vector<A> sqdist(n);
  for (int64_t i = 0; i < n; ++i) {
    weight[i] *= weight[i];
    sqdist[i] = i % 7 == 3 ? A(INFINITY) : A(i % 5) * A(d + 1);
  }
  if (n > 2 && d > 0) {
    x[2 * d + shifted] = from_float<T>(NAN);  // leaves row 2's distance as it is
    sqdist[2] = 3;
  }
  const auto run = [&](auto&& kernel) {
    std::vector<A> least(L * n, A(-7));
    std::vector<double> potential(L, -7);
    kernel(KMeansCandidates<T>{n, d, L, x.data() + shifted, candidates.data(), sqdist.data(),
                               weighted ? weight.data() : nullptr, least.data(), potential.data()});
    return std::make_pair(least, potential);
  };
  const auto on = [&](const Gpu& gpu) {
    return run([&](const auto& task) { kmeans_candidates_cuda(task, gpu); });
  };
  const auto [least, potential] =
      on_one_multiprocessor ? on(SimulatedGpu(1)) : on_simulated_gpus(on);
  const auto [want, want_potential] =
      run([](const auto& task) { kmeans_candidates_cpu(task, reversed_pool()); });
  for (size_t i = 0; i < least.size(); ++i)
    EXPECT(close(least[i], want[i], tolerance), "n=%ld d=%ld L=%ld least %zu: %g, expected %g",
           long(n), long(d), long(L), i, double(least[i]), double(want[i]));
  for (int64_t l = 0; l < L; ++l) {
    double sum = 0;  // of what was returned
    for (int64_t i = 0; i < n; ++i)
      sum += (weighted ? double(weight[i]) : 1.0) * double(least[l * n + i]);
    EXPECT(close(potential[l], sum, 1e-12) && close(sum, want_potential[l], tolerance),
           "n=%ld d=%ld L=%ld potential %ld: %g, expected %g", long(n), long(d), long(L), long(l),
           potential[l], sum);
  }
}

}  // namespace

int main() {
  for (bool flag : {false, true}) {
    for (int64_t n : {0, 1, 63, 64, 65, 300}) {
      for (int64_t d : {0, 1, 4, 37, 68}) {
        for (int64_t L : {1, 2, 7}) check<float>(n, d, L, flag, !flag, 1e-5);
      }
    }
    for (int64_t L : {0, 3, 9, 12, 13, 27}) {
      check<float>(70, 40, L, flag, flag, 1e-5);
      check<double>(70, 18, L, flag, false, 1e-13);
      check<double>(70, 18, L, flag, true, 1e-13);
      check<Half>(70, 24, L, flag, flag, 1e-5);
      check<BFloat16>(70, 24, L, flag, flag, 1e-5);
    }
    check<float>(70, 900, 10, flag, flag, 1e-5);  // beyond what shared memory holds
    check<float>(70, 2604, 5, flag, !flag, 1e-5);
    check<float>(5000, 4, 2, flag, false,
                 1e-5);  // more chunks than blocks and than summing threads
    check<float>(6500, 1, 9, flag, false, 1e-5);
  }
  // More chunks than blocks, each with more columns than shared memory holds.
  check<double>(2113, 422, 9, false, false, 1e-13, true);
  return 0;
}
