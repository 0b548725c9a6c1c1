#include "common/simd_levels.h"
#include "hvp/hvp_accumulate.h"
#include "hvp/segments.h"

namespace fastif {
namespace {

template <class L, class T, class G>
FASTIF_INLINE void accumulate_run_body(T* acc, const G* g, int64_t length, T weight) {
  constexpr int64_t kLanes = L::width / int64_t(sizeof(T));
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes)
    store_vector(acc + i, load_lanes<L>(acc + i) + weight * load_lanes<L>(g + i));
  for (; i < length; ++i) acc[i] += weight * T(to_float(g[i]));
}
FASTIF_LEVELS(accumulate_run, accumulate_run_body)

}  // namespace

template <class T, class G>
void hvp_accumulate_cpu(const HvpAccumulate<T, G>& task, const Pool& pool) {
  for_segments(task.right_hand_sides, task.dim, task.lengths, task.tensors, pool,
               [&](int64_t, int64_t r, int64_t i, int64_t t, int64_t j, int64_t length) {
                 accumulate_run(task.acc + r * task.dim + i, task.hvp[t] + r * task.lengths[t] + j,
                                length, T(task.weight));
               });
}

template void hvp_accumulate_cpu(const HvpAccumulate<float, float>&, const Pool&);
template void hvp_accumulate_cpu(const HvpAccumulate<float, Half>&, const Pool&);
template void hvp_accumulate_cpu(const HvpAccumulate<float, BFloat16>&, const Pool&);
template void hvp_accumulate_cpu(const HvpAccumulate<double, double>&, const Pool&);

}  // namespace fastif
