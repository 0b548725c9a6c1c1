// The exactly rounded functions against long double, and the same bits at every SIMD level.
#include "common/exact_math.h"

#include <initializer_list>
#include <limits>

#include "common/simd_levels.h"
#include "tests/native_test.h"

using namespace fastif;
using namespace fastif::test;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

template <class L>
FASTIF_INLINE void exps_body(const double* x, int64_t n, double* out) {
  using V = typename L::f64;
  for (int64_t i = 0; i < n; i += L::lanes / 2)
    store_vector(out + i, exact_exp<V, typename L::u64>(load_f64<L>(x + i)));
}
FASTIF_LEVELS(exps, exps_body)

// Compiled for each level, where a compiler may fuse what it likes.
template <class L>
FASTIF_INLINE void logs_body(const double* x, int64_t n, double* log, double* log1p, double* exp) {
  for (int64_t i = 0; i < n; ++i) {
    log[i] = exact_log(x[i]);
    log1p[i] = exact_log1p(x[i]);
    exp[i] = exact_exp(x[i] < 700 ? -x[i] : -700.0);
  }
}
FASTIF_LEVELS(logs, logs_body)

double ulps(double got, long double want) {
  const double rounded = std::abs(double(want));
  const double ulp = std::nextafter(rounded, kInf) - rounded;
  return double(std::abs((long double)(got)-want) / ulp);
}

void check_accuracy() {
  std::mt19937_64 engine(1);
  double worst_log = 0, worst_log1p = 0, worst_exp = 0;
  for (int i = 0; i < 400'000; ++i) {
    const double unit = (double(engine() >> 11) + 0.5) * 0x1p-53;
    const double wide = std::bit_cast<double>(engine() % 0x7ff0000000000000u);
    const double near_one = 1 + (unit - 0.5) * std::ldexp(1.0, -int(engine() % 40));
    for (double x : {unit, wide, near_one})
      worst_log = std::max(worst_log, ulps(exact_log(x), std::log((long double)(x))));
    const double tiny = unit * std::ldexp(1.0, -int(engine() % 70));
    for (double x : {-tiny, tiny, unit - 1, 3 * unit - 1, wide})
      if (x > -1 && x < 1e300)
        worst_log1p = std::max(worst_log1p, ulps(exact_log1p(x), std::log1p((long double)(x))));
    for (double x : {-unit, -700 * unit, 700 * unit, -tiny})
      worst_exp = std::max(worst_exp, ulps(exact_exp(x), std::exp((long double)(x))));
  }
  EXPECT(worst_log < 1 && worst_log1p < 1, "log %g ulp, log1p %g ulp", worst_log, worst_log1p);
  EXPECT(worst_exp < 1.5, "exp %g ulp", worst_exp);
}

void check_special_values() {
  EXPECT(exact_log(0.0) == -kInf && exact_log(kInf) == kInf && exact_log(1.0) == 0, "log");
  EXPECT(std::isnan(exact_log(-1.0)) && std::isnan(exact_log(NAN)), "log of what has none");
  EXPECT(exact_log1p(-1.0) == -kInf && exact_log1p(kInf) == kInf && exact_log1p(0.0) == 0, "log1p");
  EXPECT(std::isnan(exact_log1p(-2.0)) && std::isnan(exact_log1p(NAN)), "log1p of what has none");
  EXPECT(exact_exp(0.0) == 1 && std::isnan(exact_exp(double(NAN))), "exp");
}

// Bits that no machine may change.
void check_known_bits() {
  const auto bits = [](double x) { return std::bit_cast<uint64_t>(x); };
  const struct {
    double x;
    uint64_t log, log1p, exp;
  } known[] = {
      {0x1p-40, 0xc03bb9d3beb8c86b, 0x3d6ffffffffff000, 0x3fefffffffffe000},
      {0x1.5bf0a8b145769p-3, 0xbffc5c85fdf473de, 0x3fc415b0f06b5d9c, 0x3feb000b5d4fded9},
      {0x1.921fb54442d18p+1, 0x3ff250d048e7a1bd, 0x3ff6bcbed09f00af, 0x3fa620227b598efa},
      {0x1.8p+8, 0x4017cd753dc63374, 0x4017d01f05479589, 0x1d500e8476d3d23e},
  };
  for (const auto& k : known) {
    const uint64_t got[3] = {bits(exact_log(k.x)), bits(exact_log1p(k.x)), bits(exact_exp(-k.x))};
    EXPECT(got[0] == k.log && got[1] == k.log1p && got[2] == k.exp, "%a: 0x%lx, 0x%lx, 0x%lx", k.x,
           (unsigned long)got[0], (unsigned long)got[1], (unsigned long)got[2]);
  }
}

void check_levels() {
  constexpr int64_t kCount = 1 << 16;
  std::mt19937_64 engine(2);
  std::vector<double> x(kCount), minus(kCount), want[3], exp(kCount);
  for (int64_t i = 0; i < kCount; ++i) {
    x[i] = std::ldexp(double(engine() >> 11), -53 + int(engine() % 20) - 10);
    minus[i] = -x[i];
  }
  const SimdLevel machine = simd_level();
  for (SimdLevel level : {SimdLevel::kBase, SimdLevel::kV3, SimdLevel::kV4}) {
    if (level > machine) continue;
    simd_level() = level;
    std::vector<double> got[3];
    for (auto& g : got) g.resize(kCount);
    logs(x.data(), kCount, got[0].data(), got[1].data(), got[2].data());
    if (level == SimdLevel::kBase)
      for (int f = 0; f < 3; ++f) want[f] = got[f];
    for (int f = 0; f < 3; ++f) EXPECT(got[f] == want[f], "function %d differs", f);
    exps(minus.data(), kCount, exp.data());
    for (int64_t i = 0; i < kCount; ++i)
      EXPECT(exp[i] == want[2][i] || x[i] >= 700, "exp(%a) differs in a vector", minus[i]);
  }
}

}  // namespace

int main() {
  check_accuracy();
  check_special_values();
  check_known_bits();
  check_levels();
  std::puts("exact_math: ok");
}
