#include "sampling/merge_samples_cuda.cu"

#include <algorithm>
#include <limits>

#include "tests/gpu_test.h"

using namespace fastif;
using namespace fastif::test;

namespace {

struct Drawn {
  std::vector<int64_t> rows;
  std::vector<float> keys, threshold;

  Drawn(int64_t Y, int64_t k) : rows(Y * k), keys(Y * k), threshold(Y) {}
  Sample data() { return {rows.data(), keys.data(), threshold.data()}; }
  ConstSample view() const { return {rows.data(), keys.data(), threshold.data()}; }
  bool operator==(const Drawn&) const = default;
};

// Few distinct keys, so that ties are many; rows of a and b differ. Some classes are padded.
Drawn random_sample(int64_t Y, int64_t k, int64_t parity, unsigned seed) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  std::mt19937 engine(seed);
  Drawn out(Y, k);
  for (int64_t y = 0; y < Y; ++y) {
    const int64_t there = engine() % 3 == 0 ? int64_t(engine() % unsigned(k + 1)) : k;
    std::vector<std::pair<float, int64_t>> entries;
    for (int64_t j = 0; j < there; ++j)
      entries.emplace_back(float(engine() % 5), 2 * int64_t(engine() % 1000) + parity);
    std::sort(entries.begin(), entries.end());
    for (int64_t j = 0; j < k; ++j) {
      out.rows[y * k + j] = j < there ? entries[j].second : -1;
      out.keys[y * k + j] = j < there ? -entries[j].first : kNone;
    }
    out.threshold[y] = there < k ? kNone
                       : k > 0   ? out.keys[y * k + k - 1] - 1
                                 : float(engine() % 9);
  }
  return out;
}

void check(int64_t Y, int64_t k) {
  const Drawn a = random_sample(Y, k, 0, unsigned(Y + k)), b = random_sample(Y, k, 1, 7);
  const Drawn got = on_simulated_gpus([&](const Gpu& gpu) {
    Drawn out(Y, k);
    merge_samples_cuda(a.view(), b.view(), Y, k, out.data(), gpu);
    return out;
  });
  Drawn want(Y, k);
  merge_samples_cpu(a.view(), b.view(), Y, k, want.data());
  EXPECT(got == want, "Y=%ld k=%ld differs from the CPU's", long(Y), long(k));
}

void check_poison() {
  Drawn a = random_sample(3, 4, 0, 1), b = random_sample(3, 4, 1, 2), out(3, 4), want(3, 4);
  a.threshold[0] = b.threshold[2] = std::numeric_limits<float>::quiet_NaN();
  merge_samples_cuda(a.view(), b.view(), 3, 4, out.data(), SimulatedGpu());
  merge_samples_cpu(a.view(), b.view(), 3, 4, want.data());
  for (int64_t y = 0; y < 3; ++y) {
    EXPECT(std::isnan(out.threshold[y]) == (y != 1), "class %ld", long(y));
    for (int64_t j = 4 * y; j < 4 * y + 4; ++j)
      EXPECT(y == 1 ? out.rows[j] == want.rows[j] : out.rows[j] == -1 && std::isnan(out.keys[j]),
             "entry %ld", long(j));
  }
}

}  // namespace

int main() {
  for (int64_t Y : {0, 1, 3, 50})
    for (int64_t k : {0, 1, 2, 33, 300}) check(Y, k);
  check_poison();
  std::puts("merge_samples_cuda: ok");
}
