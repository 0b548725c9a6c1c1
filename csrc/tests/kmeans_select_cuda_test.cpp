// kmeans_nearest and kmeans_weighted: given labels and distances, the CPU's rows and bits.
#include "common/device_sort_cuda.cu"
#include "kmeans/clusters_cuda.cu"
#include "kmeans/kmeans_nearest_cuda.cu"
#include "kmeans/kmeans_weighted_cuda.cu"
#include "tests/gpu_test.h"

using namespace fastif;
using namespace fastif::test;

namespace {

template <class A>
void check(int64_t n, int64_t K, int64_t k, bool ties) {
  std::mt19937 engine(7);
  std::vector<int64_t> labels(n);
  std::vector<A> row_sqdist = normal<A>(n, 5);
  for (int64_t i = 0; i < n; ++i) {
    labels[i] = int64_t(engine() % unsigned(K + 1)) - 1;
    row_sqdist[i] = ties ? A(engine() % 3) : row_sqdist[i] * row_sqdist[i];
    if (engine() % 16 == 0) row_sqdist[i] = INFINITY;
    if (labels[i] < 0) row_sqdist[i] = NAN;
  }
  for (uint64_t seed : {uint64_t{0}, uint64_t{0x923456789abcdef0}}) {
    const KMeansWeighted<A> drawing{n, K, k, seed, labels.data(), row_sqdist.data(), nullptr};
    const auto drawn = on_simulated_gpus([&](const Gpu& gpu) {
      std::vector<int64_t> index(K * k, -7);
      auto task = drawing;
      task.index = index.data();
      kmeans_weighted_cuda(task, gpu);
      return index;
    });
    std::vector<int64_t> want(K * k, -7);
    auto task = drawing;
    task.index = want.data();
    kmeans_weighted_cpu(task, reversed_pool());
    EXPECT(drawn == want, "weighted: n=%ld K=%ld k=%ld", long(n), long(K), long(k));
  }
  const KMeansNearest<A> ranking{n, K, k, labels.data(), row_sqdist.data(), nullptr, nullptr};
  const auto run = [&](auto&& kernel) {
    std::vector<int64_t> index(K * k, -7);
    std::vector<A> sqdist(K * k, A(-7));
    auto task = ranking;
    task.index = index.data();
    task.sqdist = sqdist.data();
    kernel(task);
    return std::make_pair(index, sqdist);
  };
  const auto nearest = on_simulated_gpus([&](const Gpu& gpu) {
    return run([&](const auto& task) { kmeans_nearest_cuda(task, gpu); });
  });
  const auto want = run([](const auto& task) { kmeans_nearest_cpu(task, reversed_pool()); });
  EXPECT(nearest == want, "nearest: n=%ld K=%ld k=%ld", long(n), long(K), long(k));
}

void check_limits() {
  std::vector<int64_t> labels;
  bool refused = false;
  try {
    check_cluster_sizes("kmeans_nearest", (int64_t{1} << 32) - 1, 3);
  } catch (const std::runtime_error& error) {
    refused = std::string(error.what()).find("4294967295 rows and 3 clusters") != std::string::npos;
  }
  EXPECT(refused, "2^32 - 1 rows were taken");
  check_cluster_sizes("kmeans_nearest", (int64_t{1} << 32) - 2, (int64_t{1} << 32) - 2);
}

}  // namespace

int main() {
  for (int64_t n : {0, 1, 10, 700}) {
    for (int64_t K : {1, 3, 50}) {
      for (int64_t k : {0, 1, 7, 300}) {
        check<float>(n, K, k, n % 2 == 0);
        check<double>(n, K, k, n % 2 == 1);
      }
    }
  }
  check<float>(5000, 300, 5, true);
  check_limits();
  return 0;
}
