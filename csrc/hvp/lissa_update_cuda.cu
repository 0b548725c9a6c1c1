#include <cmath>

#include "common/numeric_types.h"
#include "common/warp.h"
#include "hvp/lissa_update.h"
#include "hvp/segments_cuda.h"

namespace fastif {
namespace {

template <class T>
struct Recursion {
  T* h;
  const T* v;
  const bool* mask;
  int64_t dim;
  T keep, step;
};

// One chunk; sums[2 (r chunks + chunk)] gets its squared change, the next its squared new value.
template <class T, class G>
__global__ void __launch_bounds__(kSegmentThreads)
    update_chunk(Segments<G> list, Recursion<T> task, double* sums, int64_t chunks) {
  __shared__ double partial[kSegmentThreads / kWarp];
  const int64_t r = blockIdx.x / list.chunks(), chunk = blockIdx.x % list.chunks();
  const int t = segment_of(list, chunk);
  const int64_t j = (chunk - list.first_chunk[t]) * kSegmentElements;
  const int64_t rest = list.length[t] - j, first = list.start[t] + j;
  const int length = int(rest < kSegmentElements ? rest : kSegmentElements);
  T* h = task.h + r * task.dim + first;
  const T* v = task.v + r * task.dim + first;
  const G* g = list.tensor[t] + r * list.length[t] + j;
  const bool aligned = is_aligned(h) && is_aligned(v) && is_aligned(g);
  double delta = 0, norm = 0;
#pragma unroll 2
  for (int i = int(threadIdx.x) * kSegmentPack; i < length; i += kSegmentThreads * kSegmentPack) {
    const int count = length - i;
    const bool whole = aligned && count >= kSegmentPack;
    const SegmentPack<T> old = load_pack(h + i, whole, count), rhs = load_pack(v + i, whole, count);
    const SegmentPack<G> product = load_pack(g + i, whole, count);
    SegmentPack<T> fresh;
    T pack_delta = 0, pack_norm = 0;
#pragma unroll
    for (int e = 0; e < kSegmentPack; ++e) {
      const T x = old.value[e];
      T y = rhs.value[e] + task.keep * x - task.step * T(to_float(product.value[e]));
      T change = y - x;
      if (e >= count || (task.mask != nullptr && !task.mask[first + i + e])) y = change = 0;
      fresh.value[e] = y;
      pack_delta += change * change;
      pack_norm += y * y;
    }
    delta += double(pack_delta);
    norm += double(pack_norm);
    store_pack(h + i, fresh, whole, count);
  }
  delta = block_sum<kSegmentThreads>(delta, partial);
  __syncthreads();
  norm = block_sum<kSegmentThreads>(norm, partial);
  if (threadIdx.x == 0) {
    double* sum = sums + 2 * (r * chunks + list.chunks_before + chunk);
    sum[0] = delta;
    sum[1] = norm;
  }
}

// One block to a right-hand side: adds up its chunks.
__global__ void __launch_bounds__(kSegmentThreads)
    finish_update(const double* sums, int64_t chunks, double* delta_sq, double* norm_sq,
                  bool* finite) {
  __shared__ double partial[kSegmentThreads / kWarp];
  const int64_t r = blockIdx.x;
  double delta = 0, norm = 0;
  for (int64_t c = threadIdx.x; c < chunks; c += kSegmentThreads) {
    delta += sums[2 * (r * chunks + c)];
    norm += sums[2 * (r * chunks + c) + 1];
  }
  delta = block_sum<kSegmentThreads>(delta, partial);
  __syncthreads();
  norm = block_sum<kSegmentThreads>(norm, partial);
  if (threadIdx.x == 0) {
    delta_sq[r] = delta;
    norm_sq[r] = norm;
    finite[r] = std::isfinite(norm);
  }
}

}  // namespace

template <class T, class G>
void lissa_update_cuda(const LissaUpdate<T, G>& task, const Gpu& gpu) {
  constexpr const char* kOp = "lissa_update_";
  const int64_t R = task.right_hand_sides, chunks = segment_chunks(task.lengths, task.tensors);
  double* sums = gpu.scratch<double>(2 * R * chunks);
  const Recursion<T> recursion{
      task.h, task.v, task.mask, task.dim, T(1.0 - task.damping / task.scale), T(1.0 / task.scale)};
  for_segment_lists(task.hvp, task.lengths, task.tensors, [&](const Segments<G>& list) {
    launch(kOp, gpu, update_chunk<T, G>, unsigned(list.chunks() * R), kSegmentThreads, 0, list,
           recursion, sums, chunks);
  });
  launch(kOp, gpu, finish_update, unsigned(R), kSegmentThreads, 0, static_cast<const double*>(sums),
         chunks, task.delta_sq, task.norm_sq, task.finite);
}

template void lissa_update_cuda(const LissaUpdate<float, float>&, const Gpu&);
template void lissa_update_cuda(const LissaUpdate<float, Half>&, const Gpu&);
template void lissa_update_cuda(const LissaUpdate<float, BFloat16>&, const Gpu&);
template void lissa_update_cuda(const LissaUpdate<double, double>&, const Gpu&);

}  // namespace fastif
