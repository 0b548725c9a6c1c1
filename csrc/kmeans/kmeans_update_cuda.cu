#include "kmeans/kmeans_update.h"

#include <bit>
#include <limits>

#include "common/launch.h"
#include "kmeans/clusters_cuda.h"

namespace fastif {
namespace {

constexpr int kThreads = 256;
constexpr int kPiece = int(kUpdatePiece);
constexpr int kPieceWidth = 32;  // threads side by side in a row, at most
constexpr int kTerms = 2;        // that a thread makes at a time: eight loads in flight
constexpr int kStage = 2048;     // partial sums that a block holds

template <class T, int kPack>
struct alignas(kPack * sizeof(T)) RowPack {
  T value[kPack];
};

// A cluster's pieces have consecutive slots, which are found without a scan: cluster j starts at
// slot (rows of clusters before j) / kPiece + j. Some slots stay unused.
struct Piece {
  int64_t cluster, cluster_rows, index;  // index of the piece in the cluster
  int64_t begin;                         // of its rows, in DeviceClusters::order
  int64_t rows_before;                   // of clusters before this one
  int rows;                              // -1 where the slot is unused

  __device__ Piece(const DeviceClusters& clusters, int64_t slot) {
    const int64_t none = clusters.start[0];
    int64_t low = 0, high = clusters.clusters - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if ((clusters.start[middle] - none) / kPiece + middle <= slot)
        low = middle;
      else
        high = middle - 1;
    }
    cluster = low;
    const int64_t first = clusters.start[low];
    cluster_rows = clusters.start[low + 1] - first;
    rows_before = first - none;
    index = slot - (rows_before / kPiece + low);
    begin = first + index * kPiece;
    const int64_t rest = cluster_rows - index * kPiece;
    rows = rest < 0 || (rest == 0 && index > 0) ? -1 : int(rest < kPiece ? rest : kPiece);
  }
};

// The pieces of clusters of more than one have consecutive rows of partial sums, from here on.
__device__ __forceinline__ int64_t first_partial(int64_t rows_before) {
  return rows_before / (kPiece / 2);
}

// A piece's sum is a sequence of terms, added in order: its fours, and its last one to three rows.
// A term is made in two steps, so that the loads of several are under way at once.
template <class T, int kPack>
struct Term {
  using A = accumulate_t<T>;
  int taken;  // rows of the four; zeros in place of the others change nothing: a sum never is -0
  bool is_tail;
  RowPack<T, kPack> row[4];
  A weight[4];

  __device__ __forceinline__ void load(const KMeansUpdate<T>& task, const uint32_t* rows, int count,
                                       int term, int64_t column) {
    is_tail = column >= task.dim / kUpdateLanes<T> * kUpdateLanes<T>;
    const int fours = count / 4, left = term - fours;
    const int first = left < 0 ? 4 * term : 4 * fours + (is_tail ? 0 : left);
    taken = left < 0 ? 4 : !is_tail ? 1 : left == 0 ? count % 4 : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t r = rows[first + i < count ? first + i : count - 1];
      row[i] = *reinterpret_cast<const RowPack<T, kPack>*>(task.x + r * task.dim + column);
      weight[i] = task.weight == nullptr ? A(1) : task.weight[r];
    }
  }

  __device__ __forceinline__ void store(bool weighted, A* out) const {
    RowPack<A, kPack> sum;
#pragma unroll
    for (int v = 0; v < kPack; ++v) {
      A a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = i < taken ? A(to_float(row[i].value[v])) : A(0);
        if (weighted) a[i] *= weight[i];
      }
      sum.value[v] = is_tail ? ((a[0] + a[1]) + a[2]) + a[3] : (a[0] + a[1]) + (a[2] + a[3]);
    }
    *reinterpret_cast<RowPack<A, kPack>*>(out) = sum;
  }
};

// A block for each slot and tile of `width` packs of columns. Its threads make terms side by side;
// then one thread to a column adds them in order, while the others load the next ones.
template <class T, int kPack>
__global__ void __launch_bounds__(kThreads)
    sum_pieces(KMeansUpdate<T> task, DeviceClusters clusters, accumulate_t<T>* partial, int width,
               int64_t tiles, int64_t blocks) {
  using A = accumulate_t<T>;
  FASTIF_DYNAMIC_SHARED(A, terms);  // [2][kTerms * groups][columns]
  __shared__ uint32_t rows[kPiece];
  const int threads = int(blockDim.x), columns = width * kPack, groups = threads / width;
  const int lane = int(threadIdx.x) % width, group = int(threadIdx.x) / width;
  const int round = kTerms * groups;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const Piece piece(clusters, block / tiles);
    if (piece.rows < 0) continue;
    const int64_t tile = block % tiles * columns;
    const bool bad = *clusters.bad != 0, is_whole = piece.cluster_rows <= kPiece;
    if (piece.index == 0 && tile == 0 && threadIdx.x == 0)
      task.counts[piece.cluster] = bad ? -1 : piece.cluster_rows;
    if (bad && piece.index > 0) continue;
    const int count = bad ? 0 : piece.rows, terms_count = count / 4 + count % 4;
    // The last barrier of the piece before this one came after all reads of its rows.
    for (int i = int(threadIdx.x); i < count; i += threads)
      rows[i] = clusters.order[piece.begin + i];
    __syncthreads();
    A sum[kPack];
#pragma unroll
    for (int v = 0; v < kPack; ++v) sum[v] = bad ? std::numeric_limits<A>::quiet_NaN() : A(0);
    A* buffer = terms;
    for (int first = 0; first < terms_count; first += round) {
      const int64_t column = tile + lane * kPack;
      const int mine = column < task.dim ? terms_count - first - group : 0;  // this thread's terms
      Term<T, kPack> term[kTerms];
#pragma unroll
      for (int u = 0; u < kTerms; ++u)
        if (u * groups < mine) term[u].load(task, rows, count, first + group + u * groups, column);
#pragma unroll
      for (int u = 0; u < kTerms; ++u)
        if (u * groups < mine)
          term[u].store(task.weight != nullptr,
                        buffer + (group + u * groups) * columns + lane * kPack);
      __syncthreads();  // the one of a round: what follows reads the buffer that is written next
                        // after another
      const int made = terms_count - first < round ? terms_count - first : round;
#pragma unroll
      for (int v = 0; v < kPack; ++v) {
        const int own = int(threadIdx.x) + v * threads;
        if (own >= columns) continue;
#pragma unroll 8
        for (int i = 0; i < made; ++i) sum[v] += buffer[i * columns + own];
      }
      buffer = buffer == terms ? terms + round * columns : terms;
    }
    A* out = is_whole || bad
                 ? task.sums + piece.cluster * task.dim
                 : partial + (first_partial(piece.rows_before) + piece.index) * task.dim;
#pragma unroll
    for (int v = 0; v < kPack; ++v) {
      const int own = int(threadIdx.x) + v * threads;
      if (own < columns && tile + own < task.dim) out[tile + own] = sum[v];
    }
  }
}

// The sums of clusters of several pieces. At most one such cluster starts in each kPiece rows: a
// block for each of those stretches and tile of `width` columns.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_partials(KMeansUpdate<T> task, DeviceClusters clusters, const accumulate_t<T>* partial,
                 int width, int64_t tiles, int64_t blocks) {
  using A = accumulate_t<T>;
  __shared__ A stage[kStage];
  if (*clusters.bad != 0) return;
  const int lane = int(threadIdx.x) % width, first_row = int(threadIdx.x) / width;
  const int rows = kStage / width, step = kThreads / width;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t stretch = block / tiles;
    // The last cluster that starts in or before the stretch is the one, if there is one.
    const int64_t none = clusters.start[0];
    int64_t low = 0, high = clusters.clusters - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if ((clusters.start[middle] - none) / kPiece <= stretch)
        low = middle;
      else
        high = middle - 1;
    }
    const int64_t before = clusters.start[low] - none;
    const int64_t count = clusters.start[low + 1] - none - before;
    if (before / kPiece != stretch || count <= kPiece) continue;
    const int64_t pieces = (count + kPiece - 1) / kPiece, column = block % tiles * width + lane;
    const A* from = partial + first_partial(before) * task.dim + column;
    double total = 0;
    for (int64_t first = 0; first < pieces; first += rows) {
      const int held = int(pieces - first < rows ? pieces - first : rows);
      __syncthreads();
      if (column < task.dim) {
#pragma unroll 8
        for (int p = first_row; p < held; p += step)
          stage[p * width + lane] = from[(first + p) * task.dim];
      }
      __syncthreads();
      if (first_row > 0 || column >= task.dim) continue;
#pragma unroll 8
      for (int p = 0; p < held; ++p) total += double(stage[p * width + lane]);
    }
    if (first_row == 0 && column < task.dim) task.sums[low * task.dim + column] = A(total);
  }
}

template <class T, int kPack>
void sum_clusters(const char* op, const KMeansUpdate<T>& task, const DeviceClusters& clusters,
                  const Gpu& gpu) {
  using A = accumulate_t<T>;
  const int64_t most = 1024 * int64_t(gpu.multiprocessors);
  A* partial = gpu.scratch<A>((task.rows / (kPiece / 2) + 1) * task.dim);
  const auto width_of = [&](int64_t items) {
    return int(
        std::min<int64_t>(kPieceWidth, std::bit_ceil(uint64_t(std::max<int64_t>(items, 1)))));
  };
  const int width = width_of(ceil_div(task.dim, kPack));
  // Small clusters leave most threads of a large block without a term.
  const int64_t terms = std::min<int64_t>(kPiece, task.rows / task.clusters) / 4 + 1;
  const int threads = int(std::clamp<int64_t>(
      width * int64_t(std::bit_ceil(uint64_t(ceil_div(terms, kTerms)))), kWarp, kThreads));
  const int64_t tiles = std::max<int64_t>(ceil_div(task.dim, width * kPack), 1);
  const int64_t blocks = (task.rows / kPiece + task.clusters) * tiles;
  launch(op, gpu, sum_pieces<T, kPack>, grid_size(blocks, 1, most), threads,
         2 * kTerms * threads * kPack * sizeof(A), task, clusters, partial, width, tiles, blocks);
  if (task.rows <= kPiece || task.dim == 0) return;
  const int narrow = width_of(task.dim);
  const int64_t strips = ceil_div(task.dim, narrow);
  const int64_t stretches = (task.rows / kPiece + 1) * strips;
  launch(op, gpu, sum_partials<T>, grid_size(stretches, 1, most), kThreads, 0, task, clusters,
         static_cast<const A*>(partial), narrow, strips, stretches);
}

}  // namespace

template <class T>
void kmeans_update_cuda(const KMeansUpdate<T>& task, const Gpu& gpu) {
  constexpr const char* kOp = "kmeans_update";
  constexpr int kPack = 16 / int(sizeof(accumulate_t<T>));
  if (task.clusters == 0) return;
  const DeviceClusters clusters = group_rows_cuda(kOp, gpu, task.labels, task.rows, task.clusters);
  const bool aligned =
      task.dim % kPack == 0 && reinterpret_cast<uintptr_t>(task.x) % (kPack * sizeof(T)) == 0;
  aligned ? sum_clusters<T, kPack>(kOp, task, clusters, gpu)
          : sum_clusters<T, 1>(kOp, task, clusters, gpu);
}

template void kmeans_update_cuda(const KMeansUpdate<float>&, const Gpu&);
template void kmeans_update_cuda(const KMeansUpdate<double>&, const Gpu&);
template void kmeans_update_cuda(const KMeansUpdate<Half>&, const Gpu&);
template void kmeans_update_cuda(const KMeansUpdate<BFloat16>&, const Gpu&);

}  // namespace fastif
