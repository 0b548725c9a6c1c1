#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "common/simd_levels.h"
#include "hvp/lissa_update.h"
#include "hvp/segments.h"

namespace fastif {
namespace {

constexpr int64_t kBlock = 1 << 10;  // elements summed in T before the sum goes on in double

// The bits of y where the mask is true, zeros elsewhere, also for NaN. Plain loops over an array
// are what GCC turns into vectors; converting one of bytes goes lane by lane.
template <class V>
FASTIF_INLINE V where(const bool* mask, V y) {
  using Bits = std::conditional_t<sizeof(y[0]) == 4, int32_t, int64_t>;
  using Mask = typename VectorOf<Bits, sizeof(V)>::type;
  Mask lanes;
  for (size_t i = 0; i < sizeof(V) / sizeof(Bits); ++i) lanes[i] = -Bits(mask[i]);
  return bits_as<V>(bits_as<Mask>(y) & lanes);
}

template <int kCount, class V>
FASTIF_INLINE double sum_all(const V* v) {
  double sum = 0;
  for (int j = 0; j < kCount; ++j)
    for (size_t i = 0; i < sizeof(V) / sizeof(v[0][0]); ++i) sum += double(v[j][i]);
  return sum;
}

// One contiguous run. Adds to sums[0] the squared change and to sums[1] the squared new value.
template <class L, bool kMasked, class T, class G>
FASTIF_INLINE void update_elements(T* __restrict h, const T* __restrict v, const G* __restrict g,
                                   const bool* __restrict mask, int64_t length, T keep, T step,
                                   double* sums) {
  using V = lanes_t<L, T>;
  constexpr int kLanes = L::width / int(sizeof(T));
  constexpr int kUnroll = std::min(4, 128 / L::width);
  for (int64_t block = 0; block < length; block += kBlock) {
    const int64_t end = std::min(length, block + kBlock);
    V delta[kUnroll]{}, norm[kUnroll]{};
    int64_t i = block;
    for (; i + kUnroll * kLanes <= end; i += kUnroll * kLanes) {
#pragma GCC unroll 4
      for (int k = 0; k < kUnroll; ++k) {
        const int64_t j = i + k * kLanes;
        const V x = load_lanes<L>(h + j);
        V y = load_lanes<L>(v + j) + keep * x - step * load_lanes<L>(g + j);
        V change = y - x;
        if constexpr (kMasked) {
          y = where(mask + j, y);
          change = where(mask + j, change);
        }
        delta[k] += change * change;
        norm[k] += y * y;
        store_vector(h + j, y);
      }
    }
    sums[0] += sum_all<kUnroll>(delta);
    sums[1] += sum_all<kUnroll>(norm);
    for (; i < end; ++i) {
      const T x = h[i];
      const bool counted = !kMasked || mask[i];
      h[i] = counted ? v[i] + keep * x - step * T(to_float(g[i])) : T(0);
      if (!counted) continue;
      sums[0] += double(h[i] - x) * double(h[i] - x);
      sums[1] += double(h[i]) * double(h[i]);
    }
  }
}

// `mask` may be null.
template <class L, class T, class G>
FASTIF_INLINE void update_run_body(T* h, const T* v, const G* g, const bool* mask, int64_t length,
                                   T keep, T step, double* sums) {
  if (mask == nullptr) {
    update_elements<L, false>(h, v, g, mask, length, keep, step, sums);
  } else {
    update_elements<L, true>(h, v, g, mask, length, keep, step, sums);
  }
}
FASTIF_LEVELS(update_run, update_run_body)

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
