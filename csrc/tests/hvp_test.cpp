#include "common/clones.h"
#include "hvp/hvp_accumulate.h"
#include "hvp/softmax_hvp.h"

#include "tests/native_test.h"

using namespace fastif;
using namespace fastif::test;

namespace {

// Of one right-hand side after the other, [R, n, C], or interleaved, [n, R, C].
template <class T>
void check_softmax(int64_t n, int64_t C, int64_t R, bool weighted, bool interleaved,
                   double tolerance) {
  using A = accumulate_t<T>;
  auto probs = random_values<T>(n * C, 1);
  for (auto& p : probs) p = from_float<T>(std::abs(float(to_float(p))) / float(C));
  const auto z = random_values<T>(R * n * C, 2);
  const auto w = normal<A>(n, 3), offset = normal<A>(R * C, 4);
  const int64_t row_stride = interleaved ? R * C : C, rhs_stride = interleaved ? C : n * C;
  auto run = [&](const Pool& pool) {
    std::vector<A> u(R * n * C, A(7));
    softmax_hvp_cpu(
        SoftmaxHvp<T>{n, C, R, probs.data(), z.data(), weighted ? w.data() : nullptr, u.data(),
                      row_stride, rhs_stride, interleaved ? offset.data() : nullptr},
        pool);
    return u;
  };
  const auto u = run(threaded_pool());
  EXPECT(run(reversed_pool()) == u, "the pool changed the result");
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = r * rhs_stride + i * row_stride;
      std::vector<double> x(C);
      double dot = 0;
      for (int64_t c = 0; c < C; ++c) {
        x[c] = to_float(z[at + c]) + (interleaved ? double(offset[r * C + c]) : 0.0);
        dot += to_float(probs[i * C + c]) * x[c];
      }
      for (int64_t c = 0; c < C; ++c) {
        const double want = (weighted ? w[i] : 1) * (to_float(probs[i * C + c]) * (x[c] - dot));
        EXPECT(close(u[at + c], want, tolerance), "row %ld class %ld of %ld: %g, expected %g",
               long(i), long(c), long(C), double(u[at + c]), want);
      }
    }
  }
}

void check_softmax_shapes() {
  for (bool weighted : {false, true}) {
    for (bool interleaved : {false, true}) {
      for (int64_t C : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 33}) {
        for (int64_t n : {0, 1, 2, 15, 16, 47}) {
          check_softmax<float>(n, C, 2, weighted, interleaved, 1e-5);
          check_softmax<double>(n, C, 3, weighted, interleaved, 1e-13);
          check_softmax<Half>(n, C, 1, weighted, interleaved, 1e-5);
          check_softmax<BFloat16>(n, C, 2, weighted, interleaved, 1e-5);
        }
      }
      check_softmax<float>(20000, 10, 1, weighted, interleaved, 1e-5);
      check_softmax<float>(20000, 3, 2, weighted, interleaved, 1e-5);
    }
  }
}

// Probabilities below the least normal number count as zero, but for halves, which have none such;
// the thread then goes on as before.
template <class T>
void check_denormals(int64_t C) {
  using A = accumulate_t<T>;
  constexpr bool kHalf = std::is_same_v<T, Half>;
  const float tiny = kHalf ? 0x1p-20f : 0x1p-130f;
  const std::vector<T> probs(C, from_float<T>(tiny));
  std::vector<T> z(C, from_float<T>(0.0f));
  z[0] = from_float<T>(1.0f);
  std::vector<A> u(C, A(7));
  softmax_hvp_cpu(SoftmaxHvp<T>{1, C, 1, probs.data(), z.data(), nullptr, u.data(), C, C},
                  reversed_pool());
#if defined(__SSE2__)
  const bool flushed = !kHalf && sizeof(T) < 8;
#else
  const bool flushed = false;
#endif
  EXPECT(u[0] == (flushed ? A(0) : A(tiny) * (1 - A(tiny))), "%g", double(u[0]));
  const volatile float one = 1, small = 0x1p-130f;
  EXPECT(one * small != 0, "denormals are still flushed");
}

void check_accumulate(int64_t R, const std::vector<int64_t>& lengths) {
  int64_t p = 0;
  for (int64_t length : lengths) p += length;
  const auto start = normal<float>(R * p, 1);
  std::vector<std::vector<float>> hvp;
  std::vector<const float*> pointers;
  for (size_t t = 0; t < lengths.size(); ++t) {
    hvp.push_back(normal<float>(R * lengths[t], unsigned(2 + t)));
    pointers.push_back(hvp.back().data());
  }
  auto acc = start;
  hvp_accumulate_cpu(HvpAccumulate<float, float>{R, p, int64_t(lengths.size()), pointers.data(),
                                                 lengths.data(), acc.data(), 0.3},
                     threaded_pool());
  for (int64_t r = 0, i = 0; r < R; ++r) {
    for (size_t t = 0; t < lengths.size(); ++t) {
      for (int64_t j = 0; j < lengths[t]; ++j, ++i) {
        const double want = start[i] + 0.3 * hvp[t][r * lengths[t] + j];
        EXPECT(close(acc[i], want, 1e-6), "element %ld: %g, expected %g", long(i), double(acc[i]),
               want);
      }
    }
  }
}

}  // namespace

int main() {
  const SimdLevel machine = simd_level();
  for (SimdLevel level : {SimdLevel::kBase, SimdLevel::kV3, SimdLevel::kV4}) {
    if (level > machine) continue;
    simd_level() = level;
    check_softmax_shapes();
    for (int64_t C : {2, 10, 40}) {
      check_denormals<float>(C);
      check_denormals<double>(C);
      check_denormals<Half>(C);
      check_denormals<BFloat16>(C);
    }
    check_accumulate(1, {0});
    check_accumulate(3, {1, 0, 37, 65536, 131});
  }
  std::puts("hvp: ok");
}
