#include "sampling/curvature_sizes_cuda.cu"

#include "common/clones.h"
#include "tests/gpu_test.h"

using namespace fastif;
using namespace fastif::test;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

template <class T>
std::vector<T> odd_logits(int64_t n, int64_t Y) {
  auto x = normal<float>(n * Y, 4);
  for (int64_t i = 0; i < n * Y; ++i) {
    x[i] *= 6;
    if (i % 9 == 4) x[i] = -std::numeric_limits<float>::infinity();
    if (i % 13 == 4) x[i] -= 400;
    if (i % 5 == 1) x[i] = 3;  // equal maxima
  }
  std::vector<T> stored(n * Y);
  for (int64_t i = 0; i < n * Y; ++i) stored[i] = from_float<T>(x[i]);
  for (int64_t i = 3; i < n; i += 17)
    for (int64_t y = 0; y < Y; ++y) stored[i * Y + y] = from_float<T>(-float(kInf));
  for (int64_t i = 5; i < n; i += 17)
    if (Y > 0) stored[i * Y + i % Y] = from_float<T>(std::numeric_limits<float>::quiet_NaN());
  return stored;
}

// -1 stands for NaN, so that results compare.
std::vector<float> comparable(std::vector<float> x) {
  for (auto& v : x)
    if (std::isnan(v)) v = -1;
  return x;
}

template <class T>
void check(int64_t n, int64_t Y, bool scaled) {
  auto logits = odd_logits<T>(n, Y);
  std::vector<double> scale(n);
  for (int64_t i = 0; i < n; ++i) scale[i] = double(i % 7) * 1.37;
  const CurvatureSizes<T> task{logits.data(), n, Y, scaled ? scale.data() : nullptr};
  auto run = [&] {
    return on_simulated_gpus([&](const Gpu& gpu) {
      std::vector<float> sizes(n, -7);
      curvature_sizes_cuda(task, sizes.data(), gpu);
      return comparable(sizes);
    });
  };
  std::vector<float> want(n);
  EXPECT(curvature_sizes_cpu(task, want.data(), reversed_pool()).row == -1, "refused");
  const SimdLevel best = simd_level();
  for (SimdLevel level : {SimdLevel::kBase, SimdLevel::kV3}) {
    if (level > best) continue;
    simd_level() = level;
    std::vector<float> sizes(n);
    curvature_sizes_cpu(task, sizes.data(), reversed_pool());
    EXPECT(sizes == want, "n=%ld Y=%ld differs at SIMD level %d", long(n), long(Y), int(level));
  }
  simd_level() = best;
  EXPECT(run() == want, "n=%ld Y=%ld differs from the CPU's bits", long(n), long(Y));
  if (n < 8 || Y == 0) return;
  logits[7 * Y] = from_float<T>(float(kInf));
  scale[4] = -1;
  scale[6] = kInf;
  const auto bad = run();
  for (int64_t i = 0; i < n; ++i)
    EXPECT(bad[i] == (i == 7 || (scaled && (i == 4 || i == 6)) ? -1 : want[i]), "row %ld", long(i));
}

void check_counts() {
  const int64_t n = 60, Y = 5;
  auto logits = odd_logits<float>(n, Y);
  unsigned long long skipped = 0, bad = ~0ull;
  std::vector<float> sizes(n), want(n);
  const CurvatureSizes<float> task{logits.data(), n, Y, nullptr};
  curvature_sizes_cpu(task, want.data(), reversed_pool());
  curvature_sizes_cuda(task, sizes.data(), SimulatedGpu(), 0.25f, &skipped, &bad);
  for (int64_t i = 0; i < n; ++i) EXPECT(sizes[i] == want[i] + 0.25f, "row %ld", long(i));
  EXPECT(skipped == 8 && bad == ~0ull, "%llu skipped", skipped);
  logits[50 * Y + 1] = logits[40 * Y] = float(kInf);
  curvature_sizes_cuda(task, sizes.data(), SimulatedGpu(), 0.25f, &skipped, &bad);
  EXPECT(bad == 40, "bad row %llu", bad);
}

}  // namespace

int main() {
  for (bool scaled : {false, true}) {
    for (int64_t Y : {0, 1, 2, 7, 8, 9, 10, 33, 100, 128, 129, 300}) check<float>(150, Y, scaled);
    check<float>(0, 5, scaled);
    check<float>(64, 10, scaled);
    check<float>(9, 4096, scaled);
    check<float>(9, 4097, scaled);
    check<float>(9, 50000, scaled);
    check<double>(9, 140000, scaled);
    check<double>(70, 19, scaled);
    check<Half>(70, 19, scaled);
    check<BFloat16>(70, 19, scaled);
  }
  check_counts();
  std::puts("curvature_sizes_cuda: ok");
}
