// The centroids as the scoring kernels of kmeans_assign read them. Only *_cuda.cu files include
// this.
//
// Rows and centroids are shifted by m, the mean of the finite centroids rounded to x's type: c' =
// c - m. The nearest centroid of row x is the one of the largest score (x - m).c' - |c'|^2/2.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "common/numeric_types.h"
#include "common/warp.h"
#include "kmeans/assign_operand_cuda.h"

namespace fastif {
namespace {

// The tile of the SIMT kernel: kTile rows by kTile centroids, kDepth columns at a time.
template <class A>
struct Simt {
  static constexpr int kVector = 16 / int(sizeof(A));
  static constexpr int kTile = 32 * kVector;
  static constexpr int kDepth = 8;
  static constexpr int kStride = kTile + kVector;  // of rows in shared memory: spreads the banks
  static constexpr int kThreads = 256;
};

// The tile of the tensor cores: kRows rows by kTile centroids, a slab of kSlab words at a time.
struct Mma {
  static constexpr int kRows = 256, kTile = 128, kSlab = 16, kThreads = 256;
};

template <class A>
struct Centroids {
  int64_t dim, clusters;
  A* mean;                // m, zeros up to depth
  Word* mean_words;       // m as operands, zeros up to slabs * kSlab
  A* seeds;               // -|c'|^2/2; -inf for a centroid that is not finite, or none
  A* columns;             // SIMT: [tile][depth][Simt::kTile], c', zeros around
  Word* words;            // tensor cores, or null: [tile][slab][Mma::kTile][kSlab], c' rounded
  unsigned char* finite;  // [clusters]
  unsigned long long* largest;  // bits of two doubles: max |c'|, max |c' rounded - c'|

  static constexpr int kPad = 128;  // a multiple of both tiles
  FASTIF_HOST_DEVICE int64_t padded() const { return (clusters + kPad - 1) / kPad * kPad; }
  FASTIF_HOST_DEVICE int64_t depth() const {
    return dim == 0 ? Simt<A>::kDepth
                    : (dim + Simt<A>::kDepth - 1) / Simt<A>::kDepth * Simt<A>::kDepth;
  }
  FASTIF_HOST_DEVICE int64_t slabs(int per_word) const {
    const int64_t width = Mma::kSlab * per_word;
    return dim == 0 ? 1 : (dim + width - 1) / width;
  }
  __device__ double largest_norm() const { return std::bit_cast<double>(largest[0]); }
  __device__ double largest_loss() const { return std::bit_cast<double>(largest[1]); }
};

constexpr int kPrepareThreads = 256, kMeanColumns = 32;

// A warp to a centroid.
template <class A>
__global__ void __launch_bounds__(kPrepareThreads)
    find_finite(const A* centroids, Centroids<A> out) {
  const int64_t j = int64_t{blockIdx.x} * (kPrepareThreads / kWarp) + threadIdx.x / kWarp;
  if (j >= out.clusters) return;
  bool finite = true;
  for (int64_t k = threadIdx.x % kWarp; k < out.dim; k += kWarp)
    finite &= std::isfinite(centroids[j * out.dim + k]);
  finite = __all_sync(kWholeWarp, finite);
  if (threadIdx.x % kWarp == 0) out.finite[j] = finite;
}

// A block to kMeanColumns columns.
template <class T, class A>
__global__ void __launch_bounds__(kPrepareThreads) find_mean(const A* centroids, Centroids<A> out) {
  constexpr int kGroups = kPrepareThreads / kMeanColumns;
  __shared__ double partial[kGroups][kMeanColumns];
  __shared__ int counts[kPrepareThreads / kWarp];
  __shared__ double weight;
  int count = 0;
  for (int64_t j = threadIdx.x; j < out.clusters; j += kPrepareThreads) count += out.finite[j];
  count = block_sum<kPrepareThreads>(count, counts);
  if (threadIdx.x == 0) weight = count == 0 ? 0.0 : 1.0 / double(count);
  __syncthreads();
  const int column = int(threadIdx.x) % kMeanColumns, group = int(threadIdx.x) / kMeanColumns;
  const int64_t k = int64_t{blockIdx.x} * kMeanColumns + column;
  double mean = 0;
#pragma unroll 4
  for (int64_t j = group; j < out.clusters; j += kGroups)
    if (k < out.dim && out.finite[j]) mean += double(centroids[j * out.dim + k]) * weight;
  partial[group][column] = mean;
  __syncthreads();
  if (group > 0 || k >= out.depth()) return;
  for (int g = 1; g < kGroups; ++g) mean += partial[g][column];
  A value = A(mean);
  if constexpr (!std::is_same_v<T, A>) value = Operand<T>::shift(value);
  out.mean[k] = std::isfinite(value) ? value : A(0);  // a half's range may be too small
}

// A warp to a centroid, those that pad the last tile among them.
template <class T, class A>
__global__ void __launch_bounds__(kPrepareThreads)
    pack_centroids(const A* centroids, Centroids<A> out) {
  const int64_t j = int64_t{blockIdx.x} * (kPrepareThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = int(threadIdx.x) % kWarp;
  const bool used = j < out.clusters && out.finite[j];
  constexpr int kTile = Simt<A>::kTile;
  A* columns = out.columns + j / kTile * kTile * out.depth() + j % kTile;
  const A* c = centroids + j * out.dim;
  double norm = 0, loss = 0;
  for (int64_t k = lane; k < out.depth(); k += kWarp) {
    const A value = used && k < out.dim ? c[k] - out.mean[k] : A(0);
    columns[k * kTile] = value;
    if (used && k < out.dim) {
      const double exact = double(c[k]) - double(out.mean[k]);
      norm += exact * exact;
    }
  }
  if constexpr (!std::is_same_v<T, double>) {
    if (out.words != nullptr) {
      constexpr int kPerWord = Operand<T>::kPerWord;
      const int64_t slabs = out.slabs(kPerWord);
      Word* words = out.words + (j / Mma::kTile * slabs * Mma::kTile + j % Mma::kTile) * Mma::kSlab;
      for (int64_t w = lane; w < slabs * Mma::kSlab; w += kWarp) {
        Word word = 0, mean = 0;
        for (int i = 0; i < kPerWord; ++i) {
          const int64_t k = w * kPerWord + i;
          if (k >= out.dim) break;
          mean |= Operand<T>::raw(out.mean[k]) << 16 * i;
          if (!used) continue;
          const Word rounded = Operand<T>::round(c[k] - out.mean[k]);
          const double lost =
              double(Operand<T>::value(rounded, 0)) - (double(c[k]) - double(out.mean[k]));
          loss += lost * lost;
          word |= rounded << 16 * i;
        }
        words[(w / Mma::kSlab) * Mma::kTile * Mma::kSlab + w % Mma::kSlab] = word;
        if (j == 0) out.mean_words[w] = mean;
      }
    }
  }
  norm = group_sum<kWarp>(norm);
  loss = group_sum<kWarp>(loss);
  if (lane != 0) return;
  out.seeds[j] = used ? A(-0.5 * norm) : -std::numeric_limits<A>::infinity();
  if (!used) return;
  // Non-negative doubles are ordered as their bits; a loss of inf - inf counts as inf.
  if (!(loss >= 0)) loss = std::numeric_limits<double>::infinity();
  atomicMax(out.largest, std::bit_cast<unsigned long long>(std::sqrt(norm)));
  atomicMax(out.largest + 1, std::bit_cast<unsigned long long>(std::sqrt(loss)));
}

// `tensor`: whether the tensor cores' form is needed.
template <class T, class A>
Centroids<A> prepare_centroids(const char* op, const Gpu& gpu, const A* centroids, int64_t clusters,
                               int64_t dim, bool tensor) {
  Centroids<A> out{};
  out.dim = dim;
  out.clusters = clusters;
  out.mean = gpu.scratch<A>(out.depth());
  out.seeds = gpu.scratch<A>(out.padded());
  out.columns = gpu.scratch<A>(out.padded() * out.depth());
  out.finite = gpu.scratch<unsigned char>(clusters);
  out.largest = gpu.scratch<unsigned long long>(2);
  if constexpr (!std::is_same_v<T, double>) {
    if (tensor) {
      const int64_t words = out.slabs(Operand<T>::kPerWord) * Mma::kSlab;
      out.mean_words = gpu.scratch<Word>(words);
      out.words = gpu.scratch<Word>(out.padded() * words);
    }
  }
  fill_bytes(op, gpu, out.largest, 0, 2 * sizeof(*out.largest));
  constexpr int kWarps = kPrepareThreads / kWarp;
  launch(op, gpu, find_finite<A>, unsigned(ceil_div(clusters, kWarps)), kPrepareThreads, 0,
         centroids, out);
  launch(op, gpu, find_mean<T, A>, unsigned(ceil_div(out.depth(), kMeanColumns)), kPrepareThreads,
         0, centroids, out);
  launch(op, gpu, pack_centroids<T, A>, unsigned(out.padded() / kWarps), kPrepareThreads, 0,
         centroids, out);
  return out;
}

}  // namespace
}  // namespace fastif
