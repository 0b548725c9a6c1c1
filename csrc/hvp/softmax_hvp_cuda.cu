#include <algorithm>

#include "common/fast_divide.h"
#include "common/launch.h"
#include "common/warp.h"
#include "hvp/softmax_hvp.h"

namespace fastif {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 4096;  // elements of probs that a block holds, and as many of z

// z[i, c] of one right-hand side, with its offset. Index arithmetic in 32 bits: see tile_rows.
template <class T>
struct Tangents {
  const T* z;
  const accumulate_t<T>* offset;
  int row_stride;

  __device__ Tangents(const SoftmaxHvp<T>& task, int64_t r, int64_t row)
      : z(task.z + r * task.rhs_stride + row * task.row_stride),
        offset(task.offset == nullptr ? nullptr : task.offset + r * task.classes),
        row_stride(int(task.row_stride)) {}
  __device__ __forceinline__ accumulate_t<T> at(int i, int c) const {
    const accumulate_t<T> x = to_float(z[i * row_stride + c]);
    return offset == nullptr ? x : x + offset[c];
  }
};

// A tile of whole rows, for every right-hand side: probs and z are read once, side by side, and
// kept in shared memory; kLanes lanes add up a row's <p, z>.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 4)
    softmax_hvp_tile(SoftmaxHvp<T> task, int tile_rows, FastDivide by_classes) {
  using A = accumulate_t<T>;
  FASTIF_DYNAMIC_SHARED(A, shared);
  A *probs = shared, *z = probs + kTile, *mean = z + kTile;
  const int C = int(task.classes), lane = int(threadIdx.x) % kLanes;
  for (int64_t tile = blockIdx.x; tile * tile_rows < task.n; tile += gridDim.x) {
    const int64_t row = tile * tile_rows;
    const int rows = int(task.n - row < tile_rows ? task.n - row : tile_rows);
    const T* tile_probs = task.probs + row * C;
#pragma unroll 4
    for (int e = threadIdx.x; e < rows * C; e += kThreads) probs[e] = to_float(tile_probs[e]);
    for (int64_t r = blockIdx.y; r < task.right_hand_sides; r += gridDim.y) {
      const Tangents<T> tangents(task, r, row);
#pragma unroll 4
      for (int e = threadIdx.x; e < rows * C; e += kThreads) {
        const int i = int(by_classes.quotient(unsigned(e)));
        z[e] = tangents.at(i, e - i * C);
      }
      __syncthreads();
      // Every lane goes as many rounds, so that all take part in the sums.
      for (int first = 0; first < rows; first += kThreads / kLanes) {
        const int i = first + int(threadIdx.x) / kLanes;
        A dot = 0;
        if (i < rows)
          for (int c = lane; c < C; c += kLanes) dot += probs[i * C + c] * z[i * C + c];
        dot = group_sum<kLanes>(dot);
        if (i < rows && lane == 0) mean[i] = dot;
      }
      __syncthreads();
      A* u = task.u + r * task.rhs_stride + row * task.row_stride;
#pragma unroll 4
      for (int e = threadIdx.x; e < rows * C; e += kThreads) {
        const int i = int(by_classes.quotient(unsigned(e)));
        const A w = task.weight == nullptr ? A(1) : task.weight[row + i];
        u[i * int(task.row_stride) + e - i * C] = w * (probs[e] * (z[e] - mean[i]));
      }
      __syncthreads();
    }
  }
}

// One block to a row of more than kTile classes, which it reads twice.
template <class T>
__global__ void __launch_bounds__(kThreads) softmax_hvp_row(SoftmaxHvp<T> task) {
  using A = accumulate_t<T>;
  __shared__ A partial[kThreads / kWarp];
  __shared__ A mean;
  for (int64_t line = blockIdx.x; line < task.n * task.right_hand_sides; line += gridDim.x) {
    const int64_t r = line % task.right_hand_sides, i = line / task.right_hand_sides;
    const T* probs = task.probs + i * task.classes;
    const Tangents<T> tangents(task, r, i);
    A dot = 0;
    for (int c = threadIdx.x; c < task.classes; c += kThreads)
      dot += to_float(probs[c]) * tangents.at(0, c);
    dot = block_sum<kThreads>(dot, partial);
    if (threadIdx.x == 0) mean = dot;
    __syncthreads();
    const A w = task.weight == nullptr ? A(1) : task.weight[i];
    A* u = task.u + r * task.rhs_stride + i * task.row_stride;
    for (int c = threadIdx.x; c < task.classes; c += kThreads)
      u[c] = w * (to_float(probs[c]) * (tangents.at(0, c) - mean));
    __syncthreads();
  }
}

}  // namespace

template <class T>
void softmax_hvp_cuda(const SoftmaxHvp<T>& task, const Gpu& gpu) {
  constexpr const char* kOp = "softmax_hvp";
  using A = accumulate_t<T>;
  if (task.classes == 0 || task.right_hand_sides == 0) return;
  const int64_t most = 64 * int64_t(gpu.multiprocessors);
  if (task.classes > kTile) {
    launch(kOp, gpu, softmax_hvp_row<T>, grid_size(task.n * task.right_hand_sides, 1, most),
           kThreads, 0, task);
    return;
  }
  // A tile's offsets fit in an int.
  const int tile_rows =
      int(std::clamp<int64_t>((int64_t{1} << 31) / (2 * task.row_stride), 1, kTile / task.classes));
  const auto kernel = task.classes >= 256  ? softmax_hvp_tile<T, 32>
                      : task.classes >= 32 ? softmax_hvp_tile<T, 8>
                                           : softmax_hvp_tile<T, 2>;
  const unsigned tiles = grid_size(task.n, tile_rows, most);
  // Right-hand sides share a block, which reads probs once, unless that leaves the GPU idle.
  const int64_t split = std::min<int64_t>(
      task.right_hand_sides, ceil_div(4 * gpu.multiprocessors, std::max<int64_t>(tiles, 1)));
  launch(kOp, gpu, kernel, dim3(tiles, unsigned(std::min<int64_t>(split, 65535))), kThreads,
         (2 * kTile + tile_rows) * sizeof(A), task, tile_rows, FastDivide(task.classes));
}

template void softmax_hvp_cuda(const SoftmaxHvp<float>&, const Gpu&);
template void softmax_hvp_cuda(const SoftmaxHvp<double>&, const Gpu&);
template void softmax_hvp_cuda(const SoftmaxHvp<Half>&, const Gpu&);
template void softmax_hvp_cuda(const SoftmaxHvp<BFloat16>&, const Gpu&);

}  // namespace fastif
