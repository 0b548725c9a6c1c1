#include <limits>

#include "kmeans/kmeans_assign_cuda.cu"
#include "tests/gpu_test.h"

using namespace fastif;
using namespace fastif::test;

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

template <class T>
struct Data {
  int64_t n, d, K;
  std::vector<T> x;
  std::vector<accumulate_t<T>> centroids;

  T& row(int64_t i, int64_t k) { return x[i * d + k]; }
  accumulate_t<T>& centroid(int64_t j, int64_t k) { return centroids[j * d + k]; }
};

template <class T>
Data<T> normal_data(int64_t n, int64_t d, int64_t K, double scale = 1, double offset = 0) {
  using A = accumulate_t<T>;
  Data<T> data{n, d, K, {}, {}};
  for (double v : normal<double>(n * d, 1)) data.x.push_back(from_float<T>(A(v * scale + offset)));
  for (double v : normal<double>(K * d, 2)) data.centroids.push_back(A(v * scale + offset));
  return data;
}

// A row with NaN, one with inf, the last centroid not finite, and two equal centroids.
template <class T>
Data<T> spoiled(Data<T> data) {
  if (data.d == 0) return data;
  using A = accumulate_t<T>;
  if (data.n > 2) data.row(2, data.d / 2) = from_float<T>(A(kNaN));
  if (data.n > 5) data.row(5, data.d - 1) = from_float<T>(A(-kInf));
  if (data.K > 1) data.centroid(data.K - 1, data.d - 1) = A(kInf);
  for (int64_t k = 0; k < data.d && data.K > 3; ++k) data.centroid(2, k) = data.centroid(0, k);
  return data;
}

enum Kernel { kSimt, kTensor };

// As on_simulated_gpus, on one multiprocessor: a block has several tiles of the rows left open.
template <class Run>
auto on_the_smallest_gpu(Run&& run) {
  cpusim::machine.order = 0;
  const auto result = run(SimulatedGpu(1));
  for (unsigned order : {1u, 2u, 3u}) {
    cpusim::machine.order = order;
    EXPECT(run(SimulatedGpu(1)) == result, "thread order %u changed the result", order);
  }
  return result;
}

// Labels against a loop in float64, distances to a few roundings; `shift` elements before x make
// its rows start at odd places.
template <class T>
void check(const Data<T>& data, Kernel kernel, int shift = 0, bool smallest = false) {
  using A = accumulate_t<T>;
  const auto [n, d, K, x, centroids] = data;
  std::vector<T> shifted(shift, T{});
  shifted.insert(shifted.end(), x.begin(), x.end());
  const auto run = [&](const Gpu& gpu) {
    std::vector<int64_t> got(n, -7);
    std::vector<A> distances(n, A(-7));
    Assign<T>({n, d, K, shifted.data() + shift, centroids.data(), got.data(), distances.data()},
              gpu, kernel == kTensor)
        .run();
    for (A& distance : distances)
      if (std::isnan(distance)) distance = -1;  // so that equal results compare equal
    return std::pair(got, distances);
  };
  const auto [labels, sqdist] = smallest ? on_the_smallest_gpu(run) : on_simulated_gpus(run);
  const double tolerance = double(d + 8) * std::numeric_limits<A>::epsilon();
  for (int64_t i = 0; i < n; ++i) {
    int64_t want = -1;
    double least = kInf;
    bool finite = true;
    for (int64_t k = 0; k < d; ++k) finite &= std::isfinite(to_float(x[i * d + k]));
    for (int64_t j = 0; j < K && finite; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < d; ++k) {
        const double delta = double(to_float(x[i * d + k])) - double(centroids[j * d + k]);
        sum += std::isfinite(centroids[j * d + k]) ? delta * delta : kNaN;
      }
      if (std::isnan(sum) || !(sum < least || (want < 0 && sum == least))) continue;
      want = j;
      least = sum;
    }
    EXPECT(labels[i] == want, "n=%ld d=%ld K=%ld kernel=%d row %ld: %ld, expected %ld", long(n),
           long(d), long(K), int(kernel), long(i), long(labels[i]), long(want));
    const double rounded = double(A(least));
    EXPECT(want < 0 ? sqdist[i] == -1
                    : sqdist[i] == rounded ||
                          std::abs(sqdist[i] - least) <=
                              tolerance * least + (d + 1) * double(std::numeric_limits<A>::min()),
           "n=%ld d=%ld K=%ld row %ld: %g, expected %g", long(n), long(d), long(K), long(i),
           double(sqdist[i]), least);
  }
}

// Rows within a few roundings of the midpoint of two centroids, or exactly on it.
template <class T>
Data<T> near_ties(int64_t n, int64_t d, int64_t K, double distance) {
  Data<T> data = normal_data<T>(n, d, K);
  const auto noise = normal<double>(n * d, 3);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < d; ++k) {
      const double middle = (double(data.centroid(i % K, k)) + data.centroid(i * 7 % K, k)) / 2;
      data.row(i, k) = from_float<T>(accumulate_t<T>(middle + distance * noise[i * d + k]));
    }
  return data;
}

// One far centroid, whose |c|^2/2 overflows: scores alone would give its rows to another.
Data<float> overflowing() {
  Data<float> data{3, 1, 10, {1.87e19f, 3.2e19f, 1e18f}, {}};
  for (int j = 0; j < 9; ++j) data.centroids.push_back(1e17f * float(j));
  data.centroids.push_back(3.3e19f);
  return data;
}

// Small integers: many exact ties of many centroids.
template <class T>
Data<T> grid(int64_t n, int64_t d, int64_t K, int levels) {
  Data<T> data = normal_data<T>(n, d, K);
  std::mt19937 engine(5);
  for (T& v : data.x) v = from_float<T>(accumulate_t<T>(int(engine() % levels)));
  for (auto& v : data.centroids) v = accumulate_t<T>(int(engine() % levels));
  return data;
}

// The best scores themselves against float64: each within score_error, which is small, and where
// the data is far apart no row is left open.
template <class T, bool kOnTensorCores>
void check_scores(const Data<T>& data, int shift, double relative_error) {
  using A = accumulate_t<T>;
  const auto [n, d, K, x, centroids] = data;
  std::vector<T> shifted(shift, T{});
  shifted.insert(shifted.end(), x.begin(), x.end());
  on_simulated_gpus([&](const Gpu& gpu) {
    std::vector<int64_t> labels(n);
    std::vector<A> sqdist(n);
    Assign<T> assign(
        {n, d, K, shifted.data() + shift, centroids.data(), labels.data(), sqdist.data()}, gpu,
        kOnTensorCores);
    const auto result = [&] {
      if constexpr (kOnTensorCores) {
        return assign.score_on_tensor_cores();
      } else {
        return assign.score_plainly();
      }
    }();
    const auto& prepared = assign.centroids();
    const A* mean = prepared.mean;
    std::vector<TopThree<A>> found(n, TopThree<A>::none());
    for (int64_t share = 0; share < result.shares.count; ++share)
      for (int64_t i = 0; i < n; ++i) found[i].add(result.found[share * n + i]);
    for (int64_t i = 0; i < n; ++i) {
      RowFacts<A> facts{0, 0, 0, true};
      double norm = 0, largest = 0;
      std::vector<double> scores(K);
      for (int64_t k = 0; k < d; ++k) {
        const A value = to_float(x[i * d + k]);
        A seen = value - mean[k];
        if constexpr (kOnTensorCores) {
          seen = rounded_operand<T>(value, mean[k]);
          facts.lost_sq += (seen - (value - mean[k])) * (seen - (value - mean[k]));
        }
        facts.norm_sq += seen * seen;
        norm += std::pow(double(value) - mean[k], 2);
      }
      for (int64_t j = 0; j < K; ++j) {
        double square = 0;
        for (int64_t k = 0; k < d; ++k) {
          const double c = double(centroids[j * d + k]) - mean[k];
          scores[j] += (double(to_float(x[i * d + k])) - mean[k]) * c;
          square += c * c;
        }
        scores[j] -= square / 2;
        largest = std::max(largest, square);
      }
      const double error = score_error<kOnTensorCores>(facts, prepared);
      EXPECT(error < relative_error * (std::sqrt(norm * largest) + largest + 1e-30), "error %g",
             error);
      const TopThree<A>& top = found[i];
      EXPECT(std::abs(top.best - scores[top.index]) <= error, "row %ld", long(i));
      EXPECT(K < 2 || std::abs(top.second - scores[top.runner_up]) <= error, "row %ld", long(i));
      std::sort(scores.rbegin(), scores.rend());
      const A three[3] = {top.best, top.second, top.third};
      for (int64_t r = 0; r < std::min<int64_t>(K, 3); ++r)
        EXPECT(std::abs(three[r] - scores[r]) <= error, "row %ld rank %ld: %g, expected %g",
               long(i), long(r), double(three[r]), scores[r]);
    }
    return found[n - 1].index;
  });
}

// Rows near one of many centroids that lie far apart: nothing is left to float64.
template <class T>
void check_certificate(Kernel kernel) {
  Data<T> data = normal_data<T>(40, 33, 150);
  for (int64_t i = 0; i < data.n; ++i)
    for (int64_t k = 0; k < data.d; ++k) data.row(i, k) = from_float<T>(data.centroid(3 * i, k));
  const auto labels = on_simulated_gpus([&](const Gpu& gpu) {
    std::vector<int64_t> got(data.n);
    std::vector<accumulate_t<T>> sqdist(data.n);
    Assign<T> assign(
        {data.n, data.d, data.K, data.x.data(), data.centroids.data(), got.data(), sqdist.data()},
        gpu, kernel == kTensor);
    assign.run();
    EXPECT(assign.left_open()[0] == 0 && assign.left_open()[1] == 0, "%d rows",
           int(assign.left_open()[0]));
    return got;
  });
  for (int64_t i = 0; i < data.n; ++i) EXPECT(labels[i] == 3 * i, "row %ld", long(i));
}

// The rows of a list get the scores they get among all rows, in their places in the list; on one
// multiprocessor a block has several tiles of rows or, of a short list, a share of the centroids.
void check_lists(int64_t n, int64_t K) {
  const Data<float> data = normal_data<float>(n, 9, K);
  std::vector<int64_t> labels(n), listed;
  std::vector<float> sqdist(n);
  for (int64_t i = n; i > 0; i -= 1 + i % 2) listed.push_back(i - 1);
  on_the_smallest_gpu([&](const Gpu& gpu) {
    Assign<float> assign(
        {n, 9, K, data.x.data(), data.centroids.data(), labels.data(), sqdist.data()}, gpu, false);
    const auto all = assign.score_plainly();
    for (size_t length : {listed.size(), size_t{3}, size_t{0}}) {
      unsigned long long count = length;
      const auto result = assign.score_plainly(RowList{listed.data(), &count}, {Shares{}, nullptr});
      const Shares shares = result.shares.of(int64_t(length), Simt<float>::kTile);
      EXPECT(length != 3 || shares.count == (K > 128 ? 2 : 1), "%d shares", shares.count);
      for (size_t i = 0; i < length; ++i) {
        TopThree<float> got = TopThree<float>::none(), want = got;
        for (int s = 0; s < shares.count; ++s) got.add(result.found[s * length + i]);
        for (int s = 0; s < all.shares.count; ++s) want.add(all.found[s * n + listed[i]]);
        EXPECT(got.best == want.best && got.second == want.second && got.third == want.third &&
                   got.index == want.index && got.runner_up == want.runner_up,
               "n=%ld K=%ld row %zu of %zu", long(n), long(K), i, length);
      }
    }
    return 0;
  });
}

template <class T>
void check_simt() {
  check_certificate<T>(kSimt);
  for (int64_t K : {1, 5, 129}) {
    check(spoiled(normal_data<T>(1, 1, K)), kSimt);
    check(spoiled(normal_data<T>(131, 13, K)), kSimt);
  }
  check(spoiled(normal_data<T>(0, 3, 2)), kSimt);
  check(spoiled(normal_data<T>(7, 0, 3)), kSimt);
  check(spoiled(normal_data<T>(70, 64, 9)), kSimt, 1);
  check(grid<T>(40, 3, 40, 3), kSimt);
}

template <class T>
void check_tensor() {
  check_certificate<T>(kTensor);
  for (int64_t d : {1, 31, 70}) check(spoiled(normal_data<T>(9, d, 5)), kTensor, d % 3);
  check(spoiled(normal_data<T>(1, 16, 129)), kTensor);
  check(spoiled(normal_data<T>(260, 36, 129)), kTensor);
  check(spoiled(normal_data<T>(20, 0, 3)), kTensor);
  check(grid<T>(30, 3, 40, 3), kTensor);
  check(near_ties<T>(60, 33, 12, 1e-3), kTensor);
  check(normal_data<T>(20, 21, 16, 1, 1000), kTensor);
}

void check_all_scores() {
  for (int64_t d : {5, 70}) {
    for (int64_t K : {1, 40, 140}) {
      const double roundings = double(d + 16) * 0x1p-22;
      check_scores<float, false>(normal_data<float>(30, d, K), 0, roundings);
      check_scores<double, false>(normal_data<double>(30, d, K), 0, roundings * 0x1p-29);
      check_scores<float, true>(normal_data<float>(30, d, K), 1, 0x1p-10 + 4 * roundings);
      check_scores<Half, true>(normal_data<Half>(30, d, K), 1, 0x1p-10 + 4 * roundings);
      check_scores<BFloat16, true>(normal_data<BFloat16>(30, d, K), 1, 0x1p-10 + 4 * roundings);
    }
  }
}

}  // namespace

int main() {
  check_all_scores();
  std::puts("scores");
  check_simt<float>();
  check_simt<double>();
  check_simt<Half>();
  check_simt<BFloat16>();
  std::puts("simt");
  for (double distance : {0.0, 1e-6, 1e-3}) {
    check(near_ties<float>(60, 33, 12, distance), kSimt);
    check(near_ties<double>(60, 33, 12, distance * 1e-9), kSimt);
    check(near_ties<float>(60, 33, 12, distance), kTensor);
  }
  for (double scale : {1e30, 1e19, 1e-20, 1e-30, 1e-44}) {
    check(spoiled(normal_data<float>(40, 12, 6, scale)), kSimt);
    check(spoiled(normal_data<float>(40, 12, 6, scale)), kTensor);
    check(spoiled(normal_data<BFloat16>(40, 12, 6, scale)), kTensor);
  }
  check(normal_data<float>(40, 12, 6, 1, 1e5), kSimt);
  check(normal_data<float>(40, 12, 6, 1, 1e5), kTensor);
  check(normal_data<double>(40, 12, 6, 1e300), kSimt);
  check(grid<float>(60, 3, 16, 3), kSimt, 0, true);
  check_lists(300, 40);
  check_lists(700, 140);
  for (Kernel kernel : {kSimt, kTensor}) {
    Data<float> data = normal_data<float>(10, 7, 3);
    for (int64_t j = 0; j < 3; ++j) data.centroid(j, j) = float(kInf);
    check(data, kernel);  // no label at all
    check(overflowing(), kernel);
  }
  std::puts("cases");
  check_tensor<float>();
  check_tensor<Half>();
  check_tensor<BFloat16>();
  return 0;
}
