#include <algorithm>
#include <cmath>
#include <vector>

#include "common/clones.h"
#include "common/simd.h"
#include "hvp/lissa_update.h"
#include "hvp/segments.h"

namespace fastif {
namespace {

constexpr int64_t kBlock = 1 << 10;  // elements summed in T before the sum goes on in double

// One contiguous run. Adds to sums[0] the squared change and to sums[1] the squared new value.
template <class T, class G>
FASTIF_CLONES void update_run(T* __restrict h, const T* __restrict v, const G* __restrict g,
                              const bool* __restrict mask, int64_t length, T keep, T step,
                              double* sums) {
  using V = typename Simd<T>::vector;
  constexpr int64_t kLanes = Simd<T>::lanes;
  for (int64_t block = 0; block < length; block += kBlock) {
    const int64_t end = std::min(length, block + kBlock);
    V delta0{}, delta1{}, norm0{}, norm1{};
    int64_t i = block;
    if (mask == nullptr) {
      for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
        const V x0 = load(h + i), x1 = load(h + i + kLanes);
        const V y0 = load(v + i) + keep * x0 - step * load(g + i);
        const V y1 = load(v + i + kLanes) + keep * x1 - step * load(g + i + kLanes);
        delta0 += (y0 - x0) * (y0 - x0);
        delta1 += (y1 - x1) * (y1 - x1);
        norm0 += y0 * y0;
        norm1 += y1 * y1;
        store(h + i, y0);
        store(h + i + kLanes, y1);
      }
    }
    double delta = sum_lanes(delta0 + delta1), norm = sum_lanes(norm0 + norm1);
    for (; i < end; ++i) {
      const T x = h[i];
      const T y = mask == nullptr || mask[i] ? v[i] + keep * x - step * T(to_float(g[i])) : T(0);
      h[i] = y;
      if (mask == nullptr || mask[i]) {
        delta += double(y - x) * double(y - x);
        norm += double(y) * double(y);
      }
    }
    sums[0] += delta;
    sums[1] += norm;
  }
}

}  // namespace

template <class T, class G>
void lissa_update_cpu(const LissaUpdate<T, G>& task, const Pool& pool) {
  const int64_t chunks = ceil_div(task.dim, kSegmentChunk);
  std::vector<double> sums(2 * task.right_hand_sides * chunks, 0.0);
  const T keep = T(1.0 - task.damping / task.scale), step = T(1.0 / task.scale);

  for_segments(task.right_hand_sides, task.dim, task.lengths, task.tensors, pool,
               [&](int64_t chunk, int64_t r, int64_t i, int64_t t, int64_t j, int64_t length) {
                 update_run(task.h + r * task.dim + i, task.v + r * task.dim + i,
                            task.hvp[t] + r * task.lengths[t] + j,
                            task.mask ? task.mask + i : nullptr, length, keep, step,
                            sums.data() + 2 * chunk);
               });

  for (int64_t r = 0; r < task.right_hand_sides; ++r) {
    double delta = 0, norm = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      delta += sums[2 * (r * chunks + c)];
      norm += sums[2 * (r * chunks + c) + 1];
    }
    task.delta_sq[r] = delta;
    task.norm_sq[r] = norm;
    task.finite[r] = std::isfinite(norm);
  }
}

template void lissa_update_cpu(const LissaUpdate<float, float>&, const Pool&);
template void lissa_update_cpu(const LissaUpdate<float, Half>&, const Pool&);
template void lissa_update_cpu(const LissaUpdate<float, BFloat16>&, const Pool&);
template void lissa_update_cpu(const LissaUpdate<double, double>&, const Pool&);

}  // namespace fastif
