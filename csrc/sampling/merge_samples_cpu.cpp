#include "sampling/merge_samples.h"

#include <algorithm>

namespace fastif {

void merge_samples_cpu(const ConstSample& a, const ConstSample& b, int64_t classes, int64_t k,
                       const Sample& out) {
  for (int64_t y = 0; y < classes; ++y) {
    int64_t i = y * k, j = y * k;
    const int64_t end = (y + 1) * k;
    for (int64_t slot = y * k; slot < end; ++slot) {  // i + j < 2 * end throughout
      const bool first = a.log_keys[i] > b.log_keys[j] ||
                         (a.log_keys[i] == b.log_keys[j] &&
                          (a.rows[i] >= 0 && (a.rows[i] <= b.rows[j] || b.rows[j] < 0)));
      out.rows[slot] = first ? a.rows[i] : b.rows[j];
      out.log_keys[slot] = first ? a.log_keys[i] : b.log_keys[j];
      ++(first ? i : j);
    }
    float threshold = std::max(a.log_threshold[y], b.log_threshold[y]);
    if (i < end) threshold = std::max(threshold, a.log_keys[i]);
    if (j < end) threshold = std::max(threshold, b.log_keys[j]);
    out.log_threshold[y] = threshold;
  }
}

}  // namespace fastif
