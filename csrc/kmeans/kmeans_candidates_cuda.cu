#include "kmeans/kmeans_candidates.h"

#include <algorithm>

#include "common/warp.h"

namespace fastif {
namespace {

constexpr int kThreads = 128;
constexpr int kLanes = 8;  // of a row
constexpr int kRows = 4;   // of a thread: each candidate it reads is used for four rows
constexpr int kChunk = kThreads / kLanes * kRows;
constexpr int kCandidateBytes = 40960;  // of shared memory

template <class T, int kPack>
struct alignas(kPack * sizeof(T)) CandidatePack {
  T value[kPack];
};

// The candidates of one launch: up to kCount, of which `count` exist.
template <class A>
struct CandidateTile {
  int64_t first;
  int count;
  int columns;      // that shared memory holds of each
  double* partial;  // [candidates, chunks]
};

// A block takes chunks of rows, and computes their distances to all candidates of the tile.
template <class T, int kPack, int kCount>
__global__ void __launch_bounds__(kThreads, 2)
    chunk_distances(KMeansCandidates<T> task, CandidateTile<accumulate_t<T>> tile, int64_t chunks) {
  using A = accumulate_t<T>;
  FASTIF_DYNAMIC_SHARED(A, centre);  // [kCount][columns]
  __shared__ A distance[kCount][kChunk];
  const int lane = int(threadIdx.x) % kLanes, group = int(threadIdx.x) / kLanes;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const T* row[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t i = chunk * kChunk + group * kRows + r;
      row[r] = task.x + (i < task.rows ? i : task.rows - 1) * task.dim;
    }
    A sum[kCount][kRows] = {};
    for (int64_t begin = 0; begin < task.dim; begin += tile.columns) {
      const int width = int(task.dim - begin < tile.columns ? task.dim - begin : tile.columns);
      if (chunk == blockIdx.x || task.dim > tile.columns) {
        __syncthreads();
        for (int c = 0; c < kCount; ++c) {
          const A* from = task.candidate + (tile.first + c) * task.dim + begin;
          for (int k = int(threadIdx.x); k < width; k += kThreads)
            centre[c * tile.columns + k] = c < tile.count ? from[k] : A(0);
        }
        __syncthreads();
      }
      for (int k = lane * kPack; k < width; k += kLanes * kPack) {
        CandidatePack<T, kPack> x[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          x[r] = *reinterpret_cast<const CandidatePack<T, kPack>*>(row[r] + begin + k);
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          const auto y =
              *reinterpret_cast<const CandidatePack<A, kPack>*>(centre + c * tile.columns + k);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int v = 0; v < kPack; ++v) {
              const A delta = to_float(x[r].value[v]) - y.value[v];
              sum[c][r] += delta * delta;
            }
          }
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const A total = group_sum<kLanes>(sum[c][r]);
        if (lane == (c * kRows + r) % kLanes) distance[c][group * kRows + r] = total;
      }
    }
    __syncthreads();
    for (int c = int(threadIdx.x / kWarp); c < tile.count; c += kThreads / kWarp) {
      double potential = 0;
      A* least = task.least + (tile.first + c) * task.rows;
      for (int i = int(threadIdx.x % kWarp); i < kChunk; i += kWarp) {
        const int64_t at = chunk * kChunk + i;
        if (at >= task.rows) continue;
        const A before = task.sqdist[at], found = distance[c][i];
        const A value = found < before ? found : before;
        least[at] = value;
        potential +=
            task.weight != nullptr ? double(task.weight[at]) * double(value) : double(value);
      }
      potential = group_sum<kWarp>(potential);
      if (threadIdx.x % kWarp == 0) tile.partial[(tile.first + c) * chunks + chunk] = potential;
    }
    __syncthreads();
  }
}

// One block to a candidate: adds up its chunks.
__global__ void __launch_bounds__(kThreads)
    sum_potentials(const double* partial, int64_t chunks, double* potential) {
  __shared__ double shared[kThreads / kWarp];
  double total = 0;
  for (int64_t c = threadIdx.x; c < chunks; c += kThreads)
    total += partial[blockIdx.x * chunks + c];
  total = block_sum<kThreads>(total, shared);
  if (threadIdx.x == 0) potential[blockIdx.x] = total;
}

template <class T, int kPack, int kCount>
void tile_distances(const char* op, const KMeansCandidates<T>& task, const Gpu& gpu, int64_t first,
                    int64_t chunks, double* partial) {
  using A = accumulate_t<T>;
  constexpr int64_t kStep = kLanes * kPack;
  constexpr int64_t kMostColumns = kCandidateBytes / (kCount * int64_t(sizeof(A))) / kStep * kStep;
  const int columns =
      int(std::min(ceil_div(std::max<int64_t>(task.dim, 1), kStep) * kStep, kMostColumns));
  const int count = int(std::min<int64_t>(kCount, task.candidates - first));
  launch(op, gpu, chunk_distances<T, kPack, kCount>,
         grid_size(chunks, 1, 32 * int64_t(gpu.multiprocessors)), kThreads,
         kCount * columns * sizeof(A), task, CandidateTile<A>{first, count, columns, partial},
         chunks);
}

template <class T, int kPack>
void all_distances(const char* op, const KMeansCandidates<T>& task, const Gpu& gpu, int64_t chunks,
                   double* partial) {
  for (int64_t first = 0; first < task.candidates;) {
    const int64_t left = task.candidates - first;
    const auto tile = [&]<int kCount>() {
      tile_distances<T, kPack, kCount>(op, task, gpu, first, chunks, partial);
      first += kCount;
    };
    if (left <= 2)
      tile.template operator()<2>();
    else if (left <= 4)
      tile.template operator()<4>();
    else if (left <= 8)
      tile.template operator()<8>();
    else
      tile.template operator()<12>();
  }
}

}  // namespace

template <class T>
void kmeans_candidates_cuda(const KMeansCandidates<T>& task, const Gpu& gpu) {
  constexpr const char* kOp = "kmeans_candidates";
  constexpr int kPack = 16 / int(sizeof(accumulate_t<T>));
  const int64_t chunks = ceil_div(task.rows, kChunk);
  double* partial = gpu.scratch<double>(task.candidates * chunks);
  if (chunks > 0) {
    const bool aligned =
        task.dim % kPack == 0 && reinterpret_cast<uintptr_t>(task.x) % (kPack * sizeof(T)) == 0;
    aligned ? all_distances<T, kPack>(kOp, task, gpu, chunks, partial)
            : all_distances<T, 1>(kOp, task, gpu, chunks, partial);
  }
  launch(kOp, gpu, sum_potentials, unsigned(task.candidates), kThreads, 0,
         static_cast<const double*>(partial), chunks, task.potential);
}

template void kmeans_candidates_cuda(const KMeansCandidates<float>&, const Gpu&);
template void kmeans_candidates_cuda(const KMeansCandidates<double>&, const Gpu&);
template void kmeans_candidates_cuda(const KMeansCandidates<Half>&, const Gpu&);
template void kmeans_candidates_cuda(const KMeansCandidates<BFloat16>&, const Gpu&);

}  // namespace fastif
