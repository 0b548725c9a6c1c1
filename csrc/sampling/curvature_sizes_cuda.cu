#include <cmath>

#include "common/launch.h"
#include "sampling/curvature_sizes.h"
#include "sampling/curvature_sums_cuda.h"

namespace fastif {
namespace {

using namespace curvature;

constexpr int kThreads = 256;
constexpr int64_t kLongest = 4096;  // classes of a row that eight threads take

struct SizeOut {
  float* sizes;
  float floor;                  // added to every size
  unsigned long long* skipped;  // rows whose softmax does not exist, or null
  unsigned long long* bad;      // the first row that cannot be used, or null
};

template <class T>
__device__ __forceinline__ void write_size(const CurvatureSizes<T>& task, const SizeOut& out,
                                           int64_t i, const RowSums& sums) {
  double size = task.classes > 0 ? curvature_of(sums.e, sums.e_sq, sums.at_max) : 0.0;
  bool bad = false;
  if (size != size) {
    size = 0;
    bad = irregular_row_kind(task.logits + i * task.classes, task.classes) == RowKind::kInfinite;
    if (!bad && out.skipped != nullptr) atomicAdd(out.skipped, 1ull);
  }
  if (task.row_scale != nullptr) {
    const double scale = task.row_scale[i];
    bad |= !(scale >= 0) || !std::isfinite(scale);
    size = exact_mul(size, scale);
  }
  const float rounded = float(size) + out.floor;
  bad |= !std::isfinite(rounded);
  out.sizes[i] = bad ? std::numeric_limits<float>::quiet_NaN() : rounded;
  if (bad && out.bad != nullptr) atomicMin(out.bad, static_cast<unsigned long long>(i));
}

// kGroup lanes to a row of at most kLongest classes.
template <class T>
__global__ void __launch_bounds__(kThreads) sizes_of_rows(CurvatureSizes<T> task, SizeOut out) {
  constexpr int kRows = kThreads / kGroup;
  for (int64_t first = blockIdx.x * int64_t(kRows); first < task.n;
       first += gridDim.x * int64_t(kRows)) {
    const int64_t i = first + threadIdx.x / kGroup;
    const bool there = i < task.n;
    const T* logits = task.logits + (there ? i * task.classes : 0);
    const int classes = int(task.classes);
    const RowSums sums = group_row_sums(logits, there ? classes : 0, classes);
    if (there && threadIdx.x % kGroup == 0) write_size(task, out, i, sums);
  }
}

// A block to a longer row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sizes_of_long_rows(CurvatureSizes<T> task, SizeOut out) {
  __shared__ BlockSums<kThreads, accumulate_t<T>> shared;
  for (int64_t i = blockIdx.x; i < task.n; i += gridDim.x) {
    const RowSums sums =
        block_row_sums<kThreads>(task.logits + i * task.classes, task.classes, shared);
    if (threadIdx.x == 0) write_size(task, out, i, sums);
  }
}

}  // namespace

template <class T>
void curvature_sizes_cuda(const CurvatureSizes<T>& task, float* sizes, const Gpu& gpu, float floor,
                          unsigned long long* skipped, unsigned long long* bad) {
  constexpr const char* kOp = "curvature_sizes";
  const SizeOut out{sizes, floor, skipped, bad};
  const int64_t most = 32 * int64_t(gpu.multiprocessors);
  if (task.classes > kLongest)
    launch(kOp, gpu, sizes_of_long_rows<T>, grid_size(task.n, 1, most), kThreads, 0, task, out);
  else
    launch(kOp, gpu, sizes_of_rows<T>, grid_size(task.n, kThreads / kGroup, most), kThreads, 0,
           task, out);
}

#define FASTIF_INSTANTIATE(T)                                                             \
  template void curvature_sizes_cuda(const CurvatureSizes<T>&, float*, const Gpu&, float, \
                                     unsigned long long*, unsigned long long*)
FASTIF_INSTANTIATE(float);
FASTIF_INSTANTIATE(double);
FASTIF_INSTANTIATE(Half);
FASTIF_INSTANTIATE(BFloat16);
#undef FASTIF_INSTANTIATE

}  // namespace fastif
