#include "common/launch.h"
#include "sampling/merge_samples.h"

namespace fastif {
namespace {

constexpr int kThreads = 256;

// Whether (key, row) goes before another; -1 goes after every row.
__device__ __forceinline__ bool before(float key, int64_t row, float other_key, int64_t other_row) {
  return key > other_key || (key == other_key && uint64_t(row) < uint64_t(other_row));
}

// A thread to each of the 2k entries of a class: its place among both samples by bisection. The
// k + 1-th goes into the threshold.
__global__ void __launch_bounds__(kThreads)
    merge_entries(ConstSample a, ConstSample b, int64_t classes, int64_t k, Sample out) {
  constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();
  const int64_t entries = classes * 2 * k;
  for (int64_t e = blockIdx.x * int64_t(kThreads) + threadIdx.x; e < entries;
       e += gridDim.x * int64_t(kThreads)) {
    const int64_t y = e / (2 * k), slot = e - y * 2 * k, base = y * k;
    const bool in_a = slot < k;
    const int64_t i = in_a ? slot : slot - k;
    const float limit_a = a.log_threshold[y], limit_b = b.log_threshold[y];
    if (limit_a != limit_a || limit_b != limit_b) {
      if (in_a) {
        out.rows[base + i] = -1;
        out.log_keys[base + i] = kPoison;
      }
      out.log_threshold[y] = kPoison;
      continue;
    }
    const ConstSample& own = in_a ? a : b;
    const ConstSample& other = in_a ? b : a;
    const float key = own.log_keys[base + i];
    const int64_t row = own.rows[base + i];
    int64_t low = 0, high = k;  // entries of the other sample that go before this one
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      const float other_key = other.log_keys[base + middle];
      const int64_t other_row = other.rows[base + middle];
      // Of equal entries, which are padding, those of a go first.
      const bool first =
          in_a ? before(other_key, other_row, key, row) : !before(key, row, other_key, other_row);
      if (first)
        low = middle + 1;
      else
        high = middle;
    }
    const int64_t place = i + low;
    if (place < k) {
      out.rows[base + place] = row;
      out.log_keys[base + place] = key;
    } else if (place == k) {
      const float larger = limit_a > limit_b ? limit_a : limit_b;
      out.log_threshold[y] = key > larger ? key : larger;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    merge_thresholds(ConstSample a, ConstSample b, int64_t classes, Sample out) {
  for (int64_t y = blockIdx.x * int64_t(kThreads) + threadIdx.x; y < classes;
       y += gridDim.x * int64_t(kThreads)) {
    const float limit_a = a.log_threshold[y], limit_b = b.log_threshold[y];
    out.log_threshold[y] = limit_a > limit_b || limit_a != limit_a ? limit_a : limit_b;
  }
}

}  // namespace

void merge_samples_cuda(const ConstSample& a, const ConstSample& b, int64_t classes, int64_t k,
                        const Sample& out, const Gpu& gpu) {
  constexpr const char* kOp = "merge_samples";
  const int64_t most = 16 * int64_t(gpu.multiprocessors);
  if (k == 0)
    launch(kOp, gpu, merge_thresholds, grid_size(classes, kThreads, most), kThreads, 0, a, b,
           classes, out);
  else
    launch(kOp, gpu, merge_entries, grid_size(classes * 2 * k, kThreads, most), kThreads, 0, a, b,
           classes, k, out);
}

}  // namespace fastif
