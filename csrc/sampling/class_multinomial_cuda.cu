#include "sampling/class_multinomial.h"

#include "common/numeric_types.h"
#include "common/warp.h"
#include "sampling/draw_cuda.h"
#include "sampling/softmax_row_cuda.h"

namespace fastif {
namespace {

constexpr const char* kOp = "class_multinomial";
constexpr float kLowest = -64.0f;  // bounds stay normal numbers, and above smaller probabilities

// What a row of logits is needed for.
struct RowNorm {
  double max, log_sum;  // log_sum of exp(x - max)
};

__device__ __forceinline__ float fast_exp(float x) {
#ifdef __CUDA_ARCH__
  return __expf(x);
#else
  return std::exp(x);
#endif
}

// What can be told of a row without regular logits. All lanes of the warp must take part; groups
// of kLanes that have a regular row pass length 0.
template <int kLanes, class T>
__device__ __forceinline__ RowKind irregular_kind(const T* row, int length) {
  bool nan = false, infinite = false;
  for (int j = int(threadIdx.x) % kLanes; j < length; j += kLanes) {
    const auto x = to_float(row[j]);
    nan |= x != x;
    infinite |= x == std::numeric_limits<decltype(x)>::infinity();
  }
  const unsigned group = (kLanes == 32 ? kWholeWarp : (1u << (kLanes % 32)) - 1)
                         << (threadIdx.x % kWarp / kLanes * kLanes);
  const bool any_nan = (__ballot_sync(kWholeWarp, nan) & group) != 0;
  const bool any_infinite = (__ballot_sync(kWholeWarp, infinite) & group) != 0;
  return any_infinite && !any_nan ? RowKind::kInfinite : RowKind::kUndefined;
}

__device__ __forceinline__ void count_irregular(RowKind kind, int64_t row,
                                                unsigned long long* skipped,
                                                unsigned long long* bad) {
  if (skipped == nullptr) return;
  if (kind == RowKind::kUndefined)
    atomicAdd(skipped, 1ull);
  else if (kind == RowKind::kInfinite)
    atomicMin(bad, static_cast<unsigned long long>(row));
}

// Rows of at most kDrawTile classes, whole: kLanes lanes turn a row into bounds, in float, and
// kSumLanes lanes compute the exact sum of those rows in which an element passes the gate.
template <class T, int kLanes>
struct TiledLogits {
  static constexpr int kBlocks = std::is_same_v<T, double> ? 2 : 4;  // at 3, doubles spill
  static constexpr int kMaxRows = 256;                               // of a tile
  const T* logits;

  struct Shared {
    RowNorm norm[kMaxRows];
    unsigned wanted[kMaxRows];
  };

  __device__ double log_unit(int64_t) const { return 0; }

  __device__ void load(const DrawPlan& plan, const DrawTile& tile, const float* limit,
                       float* bounds, Shared& shared, unsigned long long* skipped,
                       unsigned long long* bad) const {
    const int Y = plan.lines, lane = int(threadIdx.x) % kLanes;
    const T* first = logits + tile.row * int64_t(Y);
    float* out = bounds + plan.lead(tile, 0);
    for (int i = threadIdx.x; i < tile.rows; i += kDrawThreads) shared.wanted[i] = 0;
    if constexpr (!std::is_same_v<T, double>) {
#pragma unroll 4
      for (int e = threadIdx.x; e < tile.rows * Y; e += kDrawThreads) out[e] = to_float(first[e]);
      __syncthreads();
    }
    for (int base = 0; base < tile.rows; base += kDrawThreads / kLanes) {
      const int i = base + int(threadIdx.x) / kLanes;
      const int length = i < tile.rows ? Y : 0;
      float* x = out + (i < tile.rows ? i * Y : 0);
      const T* row = first + (i < tile.rows ? i * int64_t(Y) : 0);
      float max = -std::numeric_limits<float>::infinity();
      if constexpr (std::is_same_v<T, double>) {
        double wide = -std::numeric_limits<double>::infinity();
        for (int j = lane; j < length; j += kLanes) wide = row[j] > wide ? row[j] : wide;
        wide = group_max<kLanes>(wide);
        for (int j = lane; j < length; j += kLanes) x[j] = float(row[j] - wide);
        max = 0;
      } else {
        for (int j = lane; j < length; j += kLanes) max = x[j] > max ? x[j] : max;
        max = group_max<kLanes>(max);
      }
      float sum = 0;
      for (int j = lane; j < length; j += kLanes) {
        const float d = x[j] - max;
        const float e = fast_exp(d < kLowest ? kLowest : d);  // keeps NaN
        x[j] = e;
        sum += e;
      }
      sum = group_sum<kLanes>(sum);
      const bool regular = sum < std::numeric_limits<float>::infinity() || length == 0;
      if (__any_sync(kWholeWarp, !regular)) {
        const RowKind kind = irregular_kind<kLanes>(row, regular ? 0 : Y);
        if (!regular && lane == 0) count_irregular(kind, tile.row + i, skipped, bad);
      }
      const float inverse = 1 / sum;
      for (int j = lane; j < length; j += kLanes)
        x[j] = regular ? x[j] * inverse * (limit == nullptr ? 1 : limit[j]) : -1;
    }
  }

  __device__ void prepare(const DrawPlan& plan, const DrawTile& tile, const uint16_t* hits,
                          unsigned count, Shared& shared) const {
    for (unsigned h = threadIdx.x; h < count; h += kDrawThreads) {
      int r, l;
      plan.place(tile, hits[h], &r, &l);
      atomicOr(&shared.wanted[r], 1u);
    }
    __syncthreads();
    for (int base = 0; base < tile.rows; base += kDrawThreads / kSumLanes) {
      const int r = base + int(threadIdx.x) / kSumLanes;
      const bool wanted = r < tile.rows && shared.wanted[r] != 0;
      if (!__any_sync(kWholeWarp, wanted)) continue;
      const SoftmaxRow row = group_softmax_row(
          logits + (wanted ? (tile.row + r) * int64_t(plan.lines) : 0), wanted ? plan.lines : 0);
      if (wanted && threadIdx.x % kSumLanes == 0) shared.norm[r] = {row.max, exact_log1p(row.rest)};
    }
    __syncthreads();
  }

  __device__ double log_size(const DrawTile& tile, int r, int l, const Shared& shared) const {
    // The tile has whole rows.
    const double logit = to_float(logits[(tile.row + r) * int64_t(tile.lines) + l]);
    return logit - shared.norm[r].max - shared.norm[r].log_sum;
  }
};

// Longer rows, in pieces. norms holds the exact sum of each, NaN where there is none.
template <class T>
struct LongLogits {
  static constexpr int kBlocks = 3;
  const T* logits;
  const RowNorm* norms;
  int64_t classes;

  struct Shared {};

  __device__ double log_unit(int64_t) const { return 0; }

  __device__ void load(const DrawPlan& plan, const DrawTile& tile, const float* limit,
                       float* bounds, Shared&, unsigned long long*, unsigned long long*) const {
    for (int r = 0; r < tile.rows; ++r) {
      const RowNorm norm = norms[tile.row + r];
      const T* x = logits + (tile.row + r) * classes + tile.line;
      float* out = bounds + plan.slot(tile, r, 0);
      const float log_sum = float(norm.log_sum);
#pragma unroll 4
      for (int l = threadIdx.x; l < tile.lines; l += kDrawThreads) {
        float d;
        if constexpr (std::is_same_v<T, double>)
          d = float(x[l] - norm.max) - log_sum;
        else
          d = to_float(x[l]) - float(norm.max) - log_sum;
        const float p = fast_exp(d < kLowest ? kLowest : d);
        out[l] = d == d ? p * (limit == nullptr ? 1 : limit[tile.line + l]) : -1;
      }
    }
  }
  __device__ void prepare(const DrawPlan&, const DrawTile&, const uint16_t*, unsigned,
                          Shared&) const {}
  __device__ double log_size(const DrawTile& tile, int r, int l, const Shared&) const {
    const RowNorm norm = norms[tile.row + r];
    return double(to_float(logits[(tile.row + r) * classes + tile.line + l])) - norm.max -
           norm.log_sum;
  }
};

template <class T>
__global__ void __launch_bounds__(kDrawThreads, 4)
    norms_of_rows(const T* logits, int64_t n, int64_t classes, RowNorm* norms,
                  unsigned long long* skipped, unsigned long long* bad) {
  __shared__ SoftmaxRowShared<kDrawThreads> shared;
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const SoftmaxRow row = block_softmax_row<kDrawThreads>(logits + i * classes, classes, shared);
    if (threadIdx.x != 0) continue;
    count_irregular(row.kind, i, skipped, bad);
    const bool regular = row.kind == RowKind::kRegular;
    norms[i] = {row.max,
                regular ? exact_log1p(row.rest) : std::numeric_limits<double>::quiet_NaN()};
  }
}

template <class T, int kLanes>
void draw_tiled(const T* logits, int64_t n, const Draw& draw, const DrawOutput& out,
                unsigned long long* flags, const Gpu& gpu) {
  const int64_t Y = draw.classes;
  const int rows = int(std::clamp<int64_t>(kDrawTile / Y, 1, TiledLogits<T, kLanes>::kMaxRows));
  draw_sample_cuda(kOp, gpu, TiledLogits<T, kLanes>{logits}, draw, DrawPlan(draw, n, rows, int(Y)),
                   DrawPlan(draw, n, std::min(rows, 4), int(Y)), out, flags, flags + 1);
}

}  // namespace

template <class T>
void class_multinomial_cuda(const T* logits, int64_t n, const Draw& draw, const Sample& sample,
                            int64_t* skipped, const Gpu& gpu) {
  const int64_t Y = draw.classes;
  if (Y == 0) return fill_bytes(kOp, gpu, skipped, 0, sizeof(int64_t));
  unsigned long long* flags = gpu.scratch<unsigned long long>(2);  // bad, skipped
  fill_bytes(kOp, gpu, flags, 0xff, sizeof(*flags));
  fill_bytes(kOp, gpu, flags + 1, 0, sizeof(*flags));
  const DrawOutput out{sample, skipped, draw.row_offset};
  if (Y <= 16) return draw_tiled<T, 2>(logits, n, draw, out, flags, gpu);
  if (Y < 128) return draw_tiled<T, 8>(logits, n, draw, out, flags, gpu);
  if (Y <= kDrawTile) return draw_tiled<T, 32>(logits, n, draw, out, flags, gpu);
  RowNorm* norms = gpu.scratch<RowNorm>(n);
  launch(kOp, gpu, norms_of_rows<T>, grid_size(n, 1, 8 * int64_t(gpu.multiprocessors)),
         kDrawThreads, 0, logits, n, Y, norms, flags + 1, flags);
  const DrawPlan plan(draw, n, 1, kDrawTile);
  draw_sample_cuda(kOp, gpu, LongLogits<T>{logits, norms, Y}, draw, plan, plan, out, flags,
                   flags + 1);
}

#define FASTIF_INSTANTIATE(T)                                                                   \
  template void class_multinomial_cuda(const T*, int64_t, const Draw&, const Sample&, int64_t*, \
                                       const Gpu&)
FASTIF_INSTANTIATE(float);
FASTIF_INSTANTIATE(double);
FASTIF_INSTANTIATE(Half);
FASTIF_INSTANTIATE(BFloat16);
#undef FASTIF_INSTANTIATE

}  // namespace fastif
