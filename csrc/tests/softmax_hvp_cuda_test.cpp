#include "hvp/softmax_hvp_cuda.cu"

#include "tests/gpu_test.h"

using namespace fastif;
using namespace fastif::test;

namespace {

template <class T>
void check(int64_t n, int64_t C, int64_t R, bool weighted, bool interleaved, bool with_offset,
           double tolerance) {
  using A = accumulate_t<T>;
  const auto probs = random_values<T>(n * C, 1), z = random_values<T>(R * n * C, 2);
  const auto weight = normal<A>(n, 3), offset = normal<A>(R * C, 4);
  // [R, n, C] or, as linear_softmax_hvp has it, [n, R, C].
  const int64_t row_stride = interleaved ? R * C : C, rhs_stride = interleaved ? C : n * C;
  auto task = [&](A* u) {
    return SoftmaxHvp<T>{n,          C,
                         R,          probs.data(),
                         z.data(),   weighted ? weight.data() : nullptr,
                         u,          row_stride,
                         rhs_stride, with_offset ? offset.data() : nullptr};
  };
  const auto got = on_simulated_gpus([&](const Gpu& gpu) {
    std::vector<A> u(R * n * C, A(-7));
    softmax_hvp_cuda(task(u.data()), gpu);
    return u;
  });
  std::vector<A> want(R * n * C, A(-7));
  softmax_hvp_cpu(task(want.data()), reversed_pool());
  for (size_t i = 0; i < got.size(); ++i)
    EXPECT(close(got[i], want[i], tolerance), "n=%ld C=%ld R=%ld element %zu: %g, expected %g",
           long(n), long(C), long(R), i, double(got[i]), double(want[i]));
}

}  // namespace

int main() {
  for (bool interleaved : {false, true}) {
    for (bool flag : {false, true}) {
      for (int64_t C : {1, 2, 10, 33, 100, 300}) {
        check<float>(0, C, 2, flag, interleaved, flag, 1e-4);
        check<float>(1, C, 1, flag, interleaved, !flag, 1e-4);
        check<float>(97, C, 3, flag, interleaved, flag, 1e-4);
      }
      check<float>(3, 5000, 2, flag, interleaved, flag, 1e-3);
      check<double>(57, 19, 2, flag, interleaved, flag, 1e-12);
      check<Half>(57, 19, 2, flag, interleaved, flag, 1e-4);
      check<BFloat16>(57, 19, 2, flag, interleaved, flag, 1e-4);
    }
  }
  check<float>(5, 0, 2, false, false, false, 0);
  check<float>(5, 3, 0, false, false, false, 0);
  return 0;
}
