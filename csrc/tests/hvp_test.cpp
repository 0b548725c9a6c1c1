#include "hvp/hvp_accumulate.h"
#include "hvp/softmax_hvp.h"

#include "tests/native_test.h"

using namespace fastif;
using namespace fastif::test;

namespace {

template <class T>
void check_softmax(int64_t n, int64_t C, int64_t R, bool weighted, double tolerance) {
  auto probs = normal<T>(n * C, 1);
  for (auto& p : probs) p = std::abs(p) / T(C);
  const auto z = normal<T>(R * n * C, 2), w = normal<T>(n, 3);
  auto run = [&](const Pool& pool) {
    std::vector<T> u(R * n * C, T(7));
    softmax_hvp_cpu(SoftmaxHvp<T>{n, C, R, probs.data(), z.data(), weighted ? w.data() : nullptr,
                                  u.data(), C, n * C},
                    pool);
    return u;
  };
  const auto u = run(threaded_pool());
  EXPECT(run(reversed_pool()) == u, "the pool changed the result");
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      double dot = 0;
      for (int64_t c = 0; c < C; ++c) dot += double(probs[i * C + c]) * z[(r * n + i) * C + c];
      for (int64_t c = 0; c < C; ++c) {
        const int64_t at = (r * n + i) * C + c;
        const double want = (weighted ? w[i] : 1) * (probs[i * C + c] * (z[at] - dot));
        EXPECT(close(u[at], want, tolerance), "row %ld class %ld: %g, expected %g", long(i),
               long(c), double(u[at]), want);
      }
    }
  }
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
  for (bool weighted : {false, true}) {
    for (int64_t C : {1, 2, 7, 8, 15, 16, 17, 33}) {
      for (int64_t n : {0, 1, 15, 16, 47}) {
        check_softmax<float>(n, C, 2, weighted, 1e-5);
        check_softmax<double>(n, C, 3, weighted, 1e-13);
      }
    }
    check_softmax<float>(20000, 10, 1, weighted, 1e-5);
  }
  check_accumulate(1, {0});
  check_accumulate(3, {1, 0, 37, 65536, 131});
  std::puts("hvp: ok");
}
