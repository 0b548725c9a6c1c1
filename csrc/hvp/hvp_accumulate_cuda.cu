#include "common/numeric_types.h"
#include "hvp/hvp_accumulate.h"
#include "hvp/segments_cuda.h"

namespace fastif {
namespace {

template <class T, class G>
__global__ void __launch_bounds__(kSegmentThreads)
    accumulate_chunk(Segments<G> list, T* acc, int64_t dim, T weight) {
  const int64_t r = blockIdx.x / list.chunks(), chunk = blockIdx.x % list.chunks();
  const int t = segment_of(list, chunk);
  const int64_t j = (chunk - list.first_chunk[t]) * kSegmentElements;
  const int64_t rest = list.length[t] - j;
  const int length = int(rest < kSegmentElements ? rest : kSegmentElements);
  T* a = acc + r * dim + list.start[t] + j;
  const G* g = list.tensor[t] + r * list.length[t] + j;
  const bool aligned = is_aligned(a) && is_aligned(g);
  for (int i = int(threadIdx.x) * kSegmentPack; i < length; i += kSegmentThreads * kSegmentPack) {
    const int count = length - i;
    const bool whole = aligned && count >= kSegmentPack;
    SegmentPack<T> sum = load_pack(a + i, whole, count);
    const SegmentPack<G> product = load_pack(g + i, whole, count);
#pragma unroll
    for (int e = 0; e < kSegmentPack; ++e) sum.value[e] += weight * T(to_float(product.value[e]));
    store_pack(a + i, sum, whole, count);
  }
}

}  // namespace

template <class T, class G>
void hvp_accumulate_cuda(const HvpAccumulate<T, G>& task, const Gpu& gpu) {
  for_segment_lists(task.hvp, task.lengths, task.tensors, [&](const Segments<G>& list) {
    launch("hvp_accumulate_", gpu, accumulate_chunk<T, G>,
           unsigned(list.chunks() * task.right_hand_sides), kSegmentThreads, 0, list, task.acc,
           task.dim, T(task.weight));
  });
}

template void hvp_accumulate_cuda(const HvpAccumulate<float, float>&, const Gpu&);
template void hvp_accumulate_cuda(const HvpAccumulate<float, Half>&, const Gpu&);
template void hvp_accumulate_cuda(const HvpAccumulate<float, BFloat16>&, const Gpu&);
template void hvp_accumulate_cuda(const HvpAccumulate<double, double>&, const Gpu&);

}  // namespace fastif
