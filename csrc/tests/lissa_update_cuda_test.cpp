#include "hvp/lissa_update_cuda.cu"

#include "hvp/hvp_accumulate_cuda.cu"
#include "tests/gpu_test.h"

using namespace fastif;
using namespace fastif::test;

namespace {

// Products of R right-hand sides in tensors of the given lengths; `shift` misaligns them.
template <class G>
struct Products {
  std::vector<std::vector<G>> storage;
  std::vector<const G*> pointers;

  Products(int64_t R, const std::vector<int64_t>& lengths, int64_t shift) {
    for (size_t t = 0; t < lengths.size(); ++t) {
      storage.push_back(random_values<G>(R * lengths[t] + shift, unsigned(3 + t)));
      pointers.push_back(storage.back().data() + shift);
    }
  }
};

template <class T, class G>
void check(int64_t R, const std::vector<int64_t>& lengths, bool masked, int64_t shift,
           double tolerance) {
  int64_t p = 0;
  for (int64_t length : lengths) p += length;
  const Products<G> products(R, lengths, shift);
  const auto h0 = normal<T>(R * p, 1), v = normal<T>(R * p, 2);
  const std::unique_ptr<bool[]> mask(new bool[p]);
  for (int64_t i = 0; i < p; ++i) mask[i] = i % 3 == 0;

  auto run = [&](auto update) {
    auto h = h0;
    std::vector<double> sums(2 * R, -1);
    std::vector<char> finite(R, 0);
    update(LissaUpdate<T, G>{R, p, int64_t(lengths.size()), products.pointers.data(),
                             lengths.data(), h.data(), v.data(), masked ? mask.get() : nullptr, 0.3,
                             7.0, sums.data(), sums.data() + R,
                             reinterpret_cast<bool*>(finite.data())});
    return std::make_tuple(h, sums, finite);
  };
  const auto got = on_simulated_gpus([&](const Gpu& gpu) {
    return run([&](const LissaUpdate<T, G>& task) { lissa_update_cuda(task, gpu); });
  });
  const auto want =
      run([](const LissaUpdate<T, G>& task) { lissa_update_cpu(task, reversed_pool()); });
  for (size_t i = 0; i < std::get<0>(want).size(); ++i)
    EXPECT(close(std::get<0>(got)[i], std::get<0>(want)[i], tolerance), "h[%zu]", i);
  for (size_t i = 0; i < std::get<1>(want).size(); ++i)
    EXPECT(close(std::get<1>(got)[i], std::get<1>(want)[i], 10 * tolerance), "sum %zu: %g, not %g",
           i, std::get<1>(got)[i], std::get<1>(want)[i]);
  EXPECT(std::get<2>(got) == std::get<2>(want), "finite");

  auto accumulate = [&](auto add) {
    auto acc = h0;
    add(HvpAccumulate<T, G>{R, p, int64_t(lengths.size()), products.pointers.data(), lengths.data(),
                            acc.data(), 0.7});
    return acc;
  };
  const auto sum = on_simulated_gpus([&](const Gpu& gpu) {
    return accumulate([&](const HvpAccumulate<T, G>& task) { hvp_accumulate_cuda(task, gpu); });
  });
  const auto expected = accumulate(
      [](const HvpAccumulate<T, G>& task) { hvp_accumulate_cpu(task, reversed_pool()); });
  for (size_t i = 0; i < sum.size(); ++i)
    EXPECT(close(sum[i], expected[i], tolerance), "acc[%zu]", i);
}

void check_not_finite() {
  for (float bad : {INFINITY, NAN}) {
    const int64_t length = 9000;
    std::vector<float> h(2 * length), v(2 * length), g(2 * length);
    g[length + 8999] = bad;
    const float* pointer = g.data();
    double sums[4];
    bool finite[2];
    lissa_update_cuda(LissaUpdate<float, float>{2, length, 1, &pointer, &length, h.data(), v.data(),
                                                nullptr, 0.1, 1.0, sums, sums + 2, finite},
                      SimulatedGpu());
    EXPECT(finite[0] && !finite[1], "a value that is not finite in one right-hand side");
  }
}

}  // namespace

int main() {
  for (bool masked : {false, true}) {
    for (int64_t shift : {0, 1}) {
      for (int64_t R : {0, 1, 3}) {
        check<float, float>(R, {0}, masked, shift, 1e-5);
        check<float, float>(R, {1, 0, 37, 8192, 5}, masked, shift, 1e-5);
      }
      check<float, Half>(2, {8193, 131}, masked, shift, 1e-5);
      check<float, BFloat16>(2, {8193, 131}, masked, shift, 1e-5);
      check<double, double>(2, {16385, 131}, masked, shift, 1e-13);
    }
  }
  check<float, float>(2, std::vector<int64_t>(250, 3), false, 0, 1e-5);  // three launches
  check_not_finite();
  return 0;
}
