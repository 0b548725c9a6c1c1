// kmeans_nearest and kmeans_weighted: the choice of rows, given their labels and distances.
#include <algorithm>
#include <limits>

#include "common/philox.h"
#include "kmeans/kmeans_nearest.h"
#include "kmeans/kmeans_weighted.h"
#include "tests/native_test.h"

using namespace fastif;
using namespace fastif::test;

namespace {

template <class A>
void check(int64_t n, int64_t K, int64_t k) {
  std::mt19937 engine(7);
  std::vector<int64_t> labels(n);
  std::vector<A> row_sqdist(n);
  for (int64_t i = 0; i < n; ++i) {
    labels[i] = int64_t(engine() % unsigned(K + 1)) - 1;
    row_sqdist[i] = A(engine() % 5);  // many ties, many zeros
  }
  const uint64_t seed = 0x123456789abcdef0;
  std::vector<double> rank(n), exact(row_sqdist.begin(), row_sqdist.end());
  for (int64_t i = 0; i < n; ++i) {
    rank[i] = -std::log1p(-uniform(seed, uint64_t(i))) * std::sqrt(exact[i]);
  }
  auto smallest = [&](const std::vector<double>& key) {
    std::vector<int64_t> index(K * k, -1);
    for (int64_t j = 0; j < K; ++j) {
      std::vector<int64_t> rows;
      for (int64_t i = 0; i < n; ++i) {
        if (labels[i] == j) rows.push_back(i);
      }
      std::stable_sort(rows.begin(), rows.end(), [&](auto a, auto b) { return key[a] < key[b]; });
      rows.resize(std::min(k, int64_t(rows.size())));
      std::copy(rows.begin(), rows.end(), index.begin() + j * k);
    }
    return index;
  };
  for (const Pool& pool : {reversed_pool(), threaded_pool()}) {
    std::vector<int64_t> index(K * k, -7), drawn(K * k, -7);
    std::vector<A> sqdist(K * k);
    kmeans_nearest_cpu(
        KMeansNearest<A>{n, K, k, labels.data(), row_sqdist.data(), index.data(), sqdist.data()},
        pool);
    kmeans_weighted_cpu(
        KMeansWeighted<A>{n, K, k, seed, labels.data(), row_sqdist.data(), drawn.data()}, pool);
    EXPECT(index == smallest(exact), "nearest: n=%ld K=%ld k=%ld", long(n), long(K), long(k));
    EXPECT(drawn == smallest(rank), "weighted: n=%ld K=%ld k=%ld", long(n), long(K), long(k));
    for (int64_t i = 0; i < K * k; ++i) {
      const A want = index[i] < 0 ? std::numeric_limits<A>::infinity() : row_sqdist[index[i]];
      EXPECT(sqdist[i] == want, "sqdist %ld", long(i));
    }
  }
}

}  // namespace

int main() {
  for (int64_t n : {0, 1, 10, 1000}) {
    for (int64_t K : {1, 3, 50}) {
      for (int64_t k : {0, 1, 7, 2000}) {
        check<float>(n, K, k);
        check<double>(n, K, k);
      }
    }
  }
  std::puts("kmeans_nearest, kmeans_weighted: ok");
}
