// A sample that compares, and the one comparison that the tests of sampling on a GPU make.
#pragma once

#include "sampling/sample.h"
#include "tests/gpu_test.h"

namespace fastif::test {

struct DrawResult {
  std::vector<int64_t> rows;
  std::vector<float> keys, threshold;
  int64_t skipped = -99;

  DrawResult(int64_t Y, int64_t k) : rows(Y * k, -99), keys(Y * k, 99), threshold(Y, 99) {}
  Sample data() { return {rows.data(), keys.data(), threshold.data()}; }
  bool operator==(const DrawResult&) const = default;
};

inline void expect_same(const DrawResult& got, const DrawResult& want, const char* what) {
  for (size_t i = 0; i < want.rows.size(); ++i)
    EXPECT(got.rows[i] == want.rows[i] && got.keys[i] == want.keys[i],
           "%s: draw %zu is row %ld with key %a, expected %ld with %a", what, i, long(got.rows[i]),
           double(got.keys[i]), long(want.rows[i]), double(want.keys[i]));
  for (size_t y = 0; y < want.threshold.size(); ++y)
    EXPECT(got.threshold[y] == want.threshold[y], "%s: threshold %zu is %a, expected %a", what, y,
           double(got.threshold[y]), double(want.threshold[y]));
  EXPECT(got.skipped == want.skipped, "%s: %ld skipped, expected %ld", what, long(got.skipped),
         long(want.skipped));
}

inline void expect_poisoned(const DrawResult& got, int64_t bad) {
  for (size_t i = 0; i < got.rows.size(); ++i)
    EXPECT(got.rows[i] == -1 && std::isnan(got.keys[i]), "draw %zu is not poisoned", i);
  for (float t : got.threshold) EXPECT(std::isnan(t), "a threshold is not poisoned");
  EXPECT(got.skipped == -1 - bad, "skipped is %ld", long(got.skipped));
}

}  // namespace fastif::test
