#include <algorithm>
#include <type_traits>

#include "kmeans/assign_settle_cuda.h"
#include "kmeans/assign_simt_cuda.h"
#include "kmeans/assign_tensor_cuda.h"
#include "kmeans/kmeans_assign.h"

namespace fastif {
namespace {

constexpr const char* kOp = "kmeans_assign";

// How many blocks share the centroids of one row tile, `tiles` tiles of them, when `at_once` blocks
// run at a time: more only where that saves a tenth of the time, since each share's results take
// memory.
int64_t shares_of(int64_t row_tiles, int64_t tiles, int64_t at_once) {
  int64_t best = 1, least = ceil_div(row_tiles, at_once) * tiles;
  for (int64_t shares = 2; shares <= std::min<int64_t>(tiles, 32); ++shares) {
    const int64_t time = ceil_div(row_tiles * shares, at_once) * ceil_div(tiles, shares);
    if (10 * time > 9 * least) continue;
    best = shares;
    least = time;
  }
  return best;
}

// The bytes of shared memory that a block may have.
size_t most_shared() {
#ifdef __CUDACC__
  int device = 0, bytes = 0;
  check_cuda(kOp, cudaGetDevice(&device));
  check_cuda(kOp, cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return size_t(bytes);
#else
  return 99 * 1024;
#endif
}

template <class T>
class Assign {
  using A = accumulate_t<T>;

 public:
  Assign(const KMeansAssign<T>& task, const Gpu& gpu, bool tensor)
      : task_(task),
        gpu_(gpu),
        tensor_(tensor),
        centroids_(prepare_centroids<T>(kOp, gpu, task.centroids, task.clusters, task.dim, tensor)),
        certify_blocks_(
            grid_size(task.rows, kSettleThreads / kWarp, 16 * int64_t(gpu.multiprocessors))) {
    counts_ = gpu.scratch<unsigned long long>(2);
    fill_bytes(kOp, gpu, counts_, 0, 2 * sizeof(*counts_));
  }

  void run() {
    RowList open{gpu_.template scratch<int64_t>(task_.rows), counts_};
    if constexpr (!std::is_same_v<T, double>) {
      if (tensor_) {
        score_on_tensor_cores(open);
        if (!task_.exact) return settle_open(open);
        // The rows left open, a few percent, are scored again with float's smaller errors.
        const RowList still{gpu_.template scratch<int64_t>(task_.rows), counts_ + 1};
        score_plainly(open, still);
        return settle_open(still);
      }
    }
    score_plainly(RowList{nullptr, nullptr}, open);
    settle_open(open);
  }

 private:
  void score_on_tensor_cores(RowList open) {
    const int64_t row_tiles = ceil_div(task_.rows, int64_t{Mma::kRows});
    const int64_t tiles = ceil_div(task_.clusters, int64_t{Mma::kTile});
    const auto [shares, per_share] = split(row_tiles, tiles, gpu_.multiprocessors);
    auto* found = scores(shares);
    const uintptr_t starts =
        reinterpret_cast<uintptr_t>(task_.x) | uintptr_t(task_.dim * sizeof(T));
    const int unit = starts % 16 == 0 ? 16 : starts % 4 == 0 ? 4 : 2;
    const int stages = MmaShared::bytes(4) <= most_shared() ? 4 : 2;
    launch(kOp, gpu_, score_tensor<T>, dim3(unsigned(row_tiles), unsigned(shares)), Mma::kThreads,
           MmaShared::bytes(stages), task_.x, task_.rows, unit, centroids_, per_share, stages,
           found);
    launch(kOp, gpu_, certify<true, T>, certify_blocks_, kSettleThreads, 0, task_, centroids_,
           found, int(shares), task_.exact, RowList{nullptr, nullptr}, open);
  }

  // The rows of a list are at most all rows: there the grid is only as large as the GPU.
  void score_plainly(RowList list, RowList open) {
    constexpr int64_t kTile = Simt<A>::kTile;
    const int64_t row_tiles = ceil_div(task_.rows, kTile), tiles = ceil_div(task_.clusters, kTile);
    const int64_t at_once = 2 * int64_t(gpu_.multiprocessors);
    const bool all = list.rows == nullptr;
    const auto [shares, per_share] = split(row_tiles, all ? tiles : 1, at_once);
    auto* found = scores(shares);
    const dim3 grid(unsigned(all ? row_tiles : std::min(row_tiles, at_once)), unsigned(shares));
    launch(kOp, gpu_, score_simt<T>, grid, Simt<A>::kThreads, simt_shared<A>(), task_.x, task_.rows,
           list, centroids_, all ? per_share : tiles, found);
    launch(kOp, gpu_, certify<false, T>, certify_blocks_, kSettleThreads, 0, task_, centroids_,
           found, int(shares), true, list, open);
  }

  void settle_open(RowList open) {
    launch(kOp, gpu_, settle<T>, grid_size(task_.rows, 1, 4 * int64_t(gpu_.multiprocessors)),
           kSettleThreads, 0, task_, static_cast<const unsigned char*>(centroids_.finite), open);
  }

  // (shares, centroid tiles of each)
  std::pair<int64_t, int64_t> split(int64_t row_tiles, int64_t tiles, int64_t at_once) const {
    const int64_t per_share = ceil_div(tiles, shares_of(row_tiles, tiles, at_once));
    return {ceil_div(tiles, per_share), per_share};
  }

  // Room for the best scores of all rows from each share; the same for both kernels.
  TopThree<A>* scores(int64_t shares) {
    if (shares > room_) {
      found_ = gpu_.template scratch<TopThree<A>>(shares * task_.rows);
      room_ = shares;
    }
    return found_;
  }

  const KMeansAssign<T> task_;
  const Gpu& gpu_;
  const bool tensor_;
  const Centroids<A> centroids_;
  const unsigned certify_blocks_;
  unsigned long long* counts_;
  TopThree<A>* found_ = nullptr;
  int64_t room_ = 0;
};

}  // namespace

template <class T>
void kmeans_assign_cuda(const KMeansAssign<T>& task, const Gpu& gpu) {
  if (task.rows == 0) return;
  // Below these sizes most of a tensor-core tile would be padding. The choice must not depend on
  // the number of rows: every row is computed on its own.
  const bool tensor = !std::is_same_v<T, double> && task.dim >= 32 && task.clusters >= 16;
  Assign<T>(task, gpu, tensor).run();
}

template void kmeans_assign_cuda(const KMeansAssign<float>&, const Gpu&);
template void kmeans_assign_cuda(const KMeansAssign<double>&, const Gpu&);
template void kmeans_assign_cuda(const KMeansAssign<Half>&, const Gpu&);
template void kmeans_assign_cuda(const KMeansAssign<BFloat16>&, const Gpu&);

}  // namespace fastif
