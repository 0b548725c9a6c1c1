#include "hvp/lissa_update.h"

#include "common/clones.h"
#include "tests/native_test.h"

using namespace fastif;
using namespace fastif::test;

namespace {

template <class T, class G>
void check(int64_t R, const std::vector<int64_t>& lengths, bool masked, double tolerance) {
  int64_t p = 0;
  for (int64_t length : lengths) p += length;
  const auto h0 = normal<T>(R * p, 1), v = normal<T>(R * p, 2);
  std::vector<std::vector<G>> hvp;
  std::vector<const G*> pointers;
  for (size_t t = 0; t < lengths.size(); ++t) {
    hvp.push_back(random_values<G>(R * lengths[t], unsigned(3 + t)));
    pointers.push_back(hvp.back().data());
  }
  bool* mask = masked ? new bool[p] : nullptr;
  for (int64_t i = 0; masked && i < p; ++i) mask[i] = i % 3 == 0;
  const double damping = 0.3, scale = 7.0;

  auto run = [&](const Pool& pool) {
    auto h = h0;
    std::vector<double> sums(2 * R);
    std::vector<char> finite(R);
    static_assert(sizeof(bool) == 1);
    lissa_update_cpu(
        LissaUpdate<T, G>{R, p, int64_t(lengths.size()), pointers.data(), lengths.data(), h.data(),
                          v.data(), mask, damping, scale, sums.data(), sums.data() + R,
                          reinterpret_cast<bool*>(finite.data())},
        pool);
    for (double sum : sums) h.push_back(T(sum));
    for (char flag : finite) EXPECT(flag == 1, "finite input gave a false flag");
    return std::make_pair(h, sums);
  };
  const auto [h, sums] = run(threaded_pool());
  EXPECT(run(reversed_pool()) == std::make_pair(h, sums), "the pool changed the result");

  for (int64_t r = 0; r < R; ++r) {
    double delta = 0, norm = 0;
    int64_t i = r * p;
    for (size_t t = 0; t < lengths.size(); ++t) {
      for (int64_t j = 0; j < lengths[t]; ++j, ++i) {
        const double want = masked && !mask[i - r * p]
                                ? 0.0
                                : v[i] + (1 - damping / scale) * h0[i] -
                                      to_float(hvp[t][r * lengths[t] + j]) / scale;
        EXPECT(close(h[i], want, tolerance), "element %ld: %g, expected %g", long(i), double(h[i]),
               want);
        if (!masked || mask[i - r * p]) delta += (want - h0[i]) * (want - h0[i]);
        norm += want * want;
      }
    }
    EXPECT(close(sums[r], delta, 10 * tolerance), "delta_sq %g, expected %g", sums[r], delta);
    EXPECT(close(sums[R + r], norm, 10 * tolerance), "norm_sq %g, expected %g", sums[R + r], norm);
  }
  delete[] mask;
}

// What the mask leaves out may be NaN.
void check_masked_nan() {
  const int64_t p = 100;
  std::vector<float> h(p, NAN), v(p, NAN), g(p, NAN);
  bool mask[p] = {};
  for (int64_t i : {0, 63, 64, 99}) {
    mask[i] = true;
    h[i] = v[i] = g[i] = 1;
  }
  const float* hvp = g.data();
  double delta, norm;
  bool finite;
  lissa_update_cpu(LissaUpdate<float, float>{1, p, 1, &hvp, &p, h.data(), v.data(), mask, 0.0, 2.0,
                                             &delta, &norm, &finite},
                   threaded_pool());
  for (int64_t i = 0; i < p; ++i)
    EXPECT(h[i] == (mask[i] ? 1.5f : 0), "h[%ld] = %g", long(i), h[i]);
  EXPECT(delta == 1 && norm == 9 && finite, "delta_sq %g, norm_sq %g", delta, norm);
}

}  // namespace

int main() {
  const SimdLevel machine = simd_level();
  for (SimdLevel level : {SimdLevel::kBase, SimdLevel::kV3, SimdLevel::kV4}) {
    if (level > machine) continue;
    simd_level() = level;
    for (bool masked : {false, true}) {
      for (int64_t R : {0, 1, 3}) {
        check<float, float>(R, {0}, masked, 1e-5);
        check<float, float>(R, {1, 0, 37, 65536}, masked, 1e-5);
        check<float, float>(R, {70001, 131}, masked, 1e-5);
        check<float, Half>(R, {4001, 131}, masked, 1e-5);
        check<float, BFloat16>(R, {4001, 131}, masked, 1e-5);
        check<double, double>(R, {70001, 131}, masked, 1e-13);
      }
    }
    check_masked_nan();
  }
  std::puts("lissa_update: ok");
}
