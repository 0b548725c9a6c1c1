#include "sampling/class_multinomial_cuda.cu"

#include <limits>

#include "tests/draw_result.h"

using namespace fastif;
using namespace fastif::test;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

template <class T>
DrawResult on_cpu(const std::vector<T>& logits, int64_t n, const Draw& draw) {
  DrawResult out(draw.classes, draw.k);
  EXPECT(class_multinomial_cpu(logits.data(), n, draw, out.data(), &out.skipped, reversed_pool()) ==
             -1,
         "refused");
  return out;
}
template <class T>
DrawResult on_gpu(const std::vector<T>& logits, int64_t n, const Draw& draw, const Gpu& gpu) {
  DrawResult out(draw.classes, draw.k);
  class_multinomial_cuda(logits.data(), n, draw, out.data(), &out.skipped, gpu);
  return out;
}
template <class T>
void check(const char* what, const std::vector<T>& logits, int64_t n, const Draw& draw,
           bool every_order = true) {
  const DrawResult got =
      every_order ? on_simulated_gpus([&](const Gpu& gpu) { return on_gpu(logits, n, draw, gpu); })
                  : on_gpu(logits, n, draw, SimulatedGpu());
  expect_same(got, on_cpu(logits, n, draw), what);
}

template <class T>
std::vector<T> odd_logits(int64_t n, int64_t Y) {
  auto x = normal<float>(n * Y, unsigned(n + Y));
  for (int64_t i = 0; i < n * Y; ++i) {
    x[i] *= 4;
    if (i % 7 == 3) x[i] = -kInf;
    if (i % 11 == 5) x[i] -= 200;  // far below what a float probability holds
  }
  std::vector<T> stored(n * Y);
  for (int64_t i = 0; i < n * Y; ++i) stored[i] = from_float<T>(x[i]);
  for (int64_t i = 0; i < n && Y > 0; i += 13) stored[i * Y + i % Y] = from_float<T>(kNan);
  for (int64_t y = 0; y < Y && n > 1; ++y) stored[Y + y] = from_float<T>(-kInf);
  return stored;
}

template <class T>
void check_shape(int64_t n, int64_t Y, int64_t k, bool replacement, uint64_t row_offset) {
  check("odd logits", odd_logits<T>(n, Y), n, {Y, k, replacement, 77, row_offset});
}

void check_shapes(bool replacement) {
  check_shape<float>(0, 4, 3, replacement, 0);
  check_shape<float>(9, 0, 3, replacement, 0);
  check_shape<float>(40, 5, 0, replacement, 0);
  check_shape<float>(40, 5, 60, replacement, 1);
  check_shape<float>(1500, 1, 20, replacement, 1);
  check_shape<float>(3000, 10, 20, replacement, uint64_t{1} << 40);
  check_shape<float>(900, 16, 5, replacement, 7);
  check_shape<float>(500, 33, 9, replacement, 7);
  check_shape<float>(300, 130, 2, replacement, 3);
  check_shape<float>(6, 5000, 2, replacement, 3);
  check_shape<double>(6, 4300, 1, replacement, 3);
  check_shape<double>(400, 7, 20, replacement, 5);
  check_shape<double>(300, 40, 4, replacement, 5);
  check_shape<BFloat16>(600, 10, 9, replacement, 5);
  check_shape<Half>(600, 10, 9, replacement, 5);
}

// Inputs for which the guess fails, or that make many equal keys.
void check_adversaries(bool replacement) {
  const int64_t n = 3000, Y = 3, k = 10;
  std::vector<float> x(n * Y, 0.0f);
  check("equal logits", x, n, {Y, k, replacement, 5, 0}, false);
  for (int64_t i = 0; i < n; ++i) x[i * Y] = i >= n - 20 ? 9.0f : -30.0f;
  check("mass at the end", x, n, {Y, k, replacement, 5, 0}, false);
  for (int64_t i = 0; i < n; ++i) x[i * Y] = i == 1234 ? 0.0f : -200.0f;
  check("mass in one row", x, n, {Y, k, replacement, 5, 0}, false);
  for (int64_t i = 0; i < n; ++i) x[i * Y] = -60 + 90 * float(i) / float(n);
  check("sizes that grow", x, n, {Y, k, replacement, 5, 0});
  for (int64_t i = 0; i < n; ++i) x[i * Y] = i < 5 ? 1.0f : -kInf;
  check("fewer than k rows", x, n, {Y, k, replacement, 5, 0}, false);
  // Keys at which no arrival shows: ties by row.
  std::vector<double> wide(n * Y, 0.0);
  for (int64_t i = 0; i < n; ++i) wide[i * Y] = -1e30;
  check("ties of all rows", wide, n, {Y, k, replacement, 5, 0});
  for (int64_t i = 0; i < n; ++i) wide[i * Y] = i % 5 == 2 ? -1e300 : -kInf;
  check("keys of -inf", wide, n, {Y, k, replacement, 5, 0}, false);
  for (int64_t i = 0; i < n; ++i) wide[i * Y] = i == 7 ? 50 : -500.0 - double(i % 3);
  check("a row that has it all", wide, n, {Y, k, replacement, 5, 0}, false);
}

// More candidates than one block sorts.
void check_many_draws(bool replacement) {
  const int64_t n = 6000;
  check("many draws", odd_logits<float>(n, 2), n, {2, 1500, replacement, 3, 0}, false);
  check("all rows", odd_logits<float>(n, 1), n, {1, n, false, 3, 0}, false);
}

void check_infinite() {
  for (bool replacement : {false, true}) {
    auto logits = odd_logits<float>(900, 5);
    logits[500 * 5 + 2] = logits[14 * 5] = kInf;
    logits[13 * 5] = kInf;  // has NaN, which goes first
    expect_poisoned(on_gpu(logits, 900, {5, 20, replacement, 1, 0}, SimulatedGpu()), 14);
    auto wide = odd_logits<double>(4, 5000);
    wide[2 * 5000 + 4999] = kInf;
    expect_poisoned(on_gpu(wide, 4, {5000, 2, replacement, 1, 0}, SimulatedGpu()), 2);
  }
}

}  // namespace

int main() {
  for (bool replacement : {false, true}) {
    check_shapes(replacement);
    check_adversaries(replacement);
    check_many_draws(replacement);
  }
  check_infinite();
  std::puts("class_multinomial_cuda: ok");
}
