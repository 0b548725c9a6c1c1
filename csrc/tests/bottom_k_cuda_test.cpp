#include "sampling/bottom_k_cuda.cu"
// After it: they share draw_weights_cuda.h.
#include "sampling/curvature_multinomial_cuda.cu"
#include "sampling/curvature_sizes_cuda.cu"

#include "tests/draw_result.h"

using namespace fastif;
using namespace fastif::test;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class T>
DrawResult on_gpu(const Weights<T>& w, const Draw& draw, const Gpu& gpu) {
  DrawResult out(w.lines, draw.k);
  bottom_k_cuda(w, draw, out.data(), gpu);
  return out;
}
template <class T>
void check(const char* what, const Weights<T>& w, const Draw& draw, bool every_order = true) {
  DrawResult want(w.lines, draw.k);
  EXPECT(bottom_k_cpu(w, draw, want.data(), reversed_pool()) == -1, "refused");
  const DrawResult got =
      every_order ? on_simulated_gpus([&](const Gpu& gpu) { return on_gpu(w, draw, gpu); })
                  : on_gpu(w, draw, SimulatedGpu());
  expect_same(got, want, what);
}

// step: between neighbours of the layout's inner dimension.
template <class T>
void check_layout(int64_t n, int64_t R, int64_t k, bool replacement, bool transposed, int64_t step,
                  double unit) {
  const auto values = normal<double>(n * R, 5);
  std::vector<T> data(std::max<int64_t>(1, n * R * step), from_float<T>(-1));
  const Weights<T> w{data.data(), R, n, transposed ? step : n * step, transposed ? R * step : step};
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      T& to = data[r * w.line_stride + i * w.step_stride];
      const double x = (i + r) % 5 == 0 ? 0 : unit * std::exp(3 * values[r * n + i]);
      if constexpr (std::is_same_v<T, double>)
        to = x;
      else
        to = from_float<T>(float(x));
    }
  }
  const Draw draw{R, k, replacement, 78, 3};
  check("weights", w, draw, n * R < 3000);
  if (n < 3 || R == 0) return;
  data[(R - 1) * w.line_stride + (n - 2) * w.step_stride] = from_float<T>(-1);
  DrawResult bad = on_gpu(w, draw, SimulatedGpu());
  bad.skipped = -1;
  expect_poisoned(bad, 0);
}

void check_misleading_probes(bool replacement) {
  const int64_t n = 8192;
  std::vector<float> w(n);
  for (int64_t i = 0; i < n; ++i) w[i] = i % 64 < 4 ? 1.0f : 1e-6f;
  const Weights<float> line{w.data(), 1, n, n, 1};
  check("high guess", line, {1, 200, replacement, 80, 0}, false);
  for (int64_t i = 0; i < n; ++i) w[i] = i % 8 < 4 ? 1e-6f : 1.0f;
  check("low guess", line, {1, 50, replacement, 80, 0}, false);
  for (int64_t i = 0; i < n; ++i) w[i] = 1.0f / float(i * i + 1);
  check("a heavy tail", line, {1, 50, replacement, 80, 0}, false);
}

template <class T>
void check_curvature(int64_t n, int64_t Y, int64_t m, float floor) {
  auto logits = random_values<T>(n * Y, 9);
  if (n > 2) logits[2 * Y] = from_float<T>(std::numeric_limits<float>::quiet_NaN());
  std::vector<double> scale(n);
  for (int64_t i = 0; i < n; ++i) scale[i] = double(i % 17);
  const CurvatureSizes<T> task{logits.data(), n, Y, scale.data()};
  const Draw draw{1, m, false, 79, 1000};
  auto run = [&](const Gpu& gpu) {
    DrawResult out(1, m);
    curvature_multinomial_cuda(task, floor, draw, out.data(), &out.skipped, gpu);
    return out;
  };
  DrawResult want(1, m);
  EXPECT(curvature_multinomial_cpu(task, floor, draw, want.data(), &want.skipped, reversed_pool())
                 .row == -1,
         "refused");
  expect_same(on_simulated_gpus(run), want, "curvature_multinomial");
  if (n < 10) return;
  scale[7] = kInfinity;
  logits[9 * Y] = from_float<T>(float(kInfinity));
  expect_poisoned(run(SimulatedGpu()), 7);
}

}  // namespace

int main() {
  for (bool replacement : {false, true}) {
    for (bool transposed : {false, true}) {
      check_layout<float>(0, 2, 3, replacement, transposed, 1, 1);
      check_layout<float>(5, 0, 3, replacement, transposed, 1, 1);
      check_layout<float>(2000, 3, 40, replacement, transposed, 1, 1e-30);
      check_layout<float>(900, 1, 4, replacement, transposed, 2, 1);
      check_layout<double>(2500, 5, 10, replacement, transposed, 2, 1e290);
      check_layout<double>(700, 1, 10, replacement, transposed, 1, 1e-310);
      check_layout<double>(20, 70, 30, replacement, transposed, 1, 1e-200);
      check_layout<Half>(30, 150, 2, replacement, transposed, 1, 0.01);
    }
    check_layout<BFloat16>(3, 4500, 1, replacement, replacement, 1, 1);
    check_misleading_probes(replacement);
  }
  for (float floor : {0.0f, 0.25f, 1e30f}) {
    check_curvature<float>(0, 3, 4, floor);
    check_curvature<float>(900, 10, 50, floor);
    check_curvature<double>(100, 33, 200, floor);
    check_curvature<Half>(50, 1, 5, floor);
    check_curvature<BFloat16>(60, 3, 5, floor);
  }
  std::puts("bottom_k_cuda: ok");
}
