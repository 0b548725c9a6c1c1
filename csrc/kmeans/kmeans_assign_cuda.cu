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
  return (cpusim::machine.order < 2 ? 99 : 227) *
         1024;  // as GPUs for work stations, for servers have
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
        counts_(gpu.scratch<unsigned long long>(2)) {
    fill_bytes(kOp, gpu, counts_, 0, 2 * sizeof(*counts_));
  }

  void run() {
    const RowList open = new_list(0);
    if constexpr (!std::is_same_v<T, double>) {
      if (tensor_) {
        const Scores scores = score_on_tensor_cores();
        certify_labels<true>(scores, task_.exact, kAllRows, open);
        if (!task_.exact) return settle_labels(open);
        // The rows left open are scored again with float's smaller errors.
        const RowList still_open = new_list(1);
        certify_labels<false>(score_plainly(open, scores), true, open, still_open);
        return settle_labels(still_open);
      }
    }
    certify_labels<false>(score_plainly(), true, kAllRows, open);
    settle_labels(open);
  }

  // The best scores of each row, from each share of the centroids: [shares, rows].
  struct Scores {
    Shares shares;
    TopThree<A>* found;
  };

  Scores score_on_tensor_cores() {
    const int64_t row_tiles = ceil_div(task_.rows, int64_t{Mma::kRows});
    const int64_t tiles = ceil_div(task_.clusters, int64_t{Mma::kTile});
    const Scores scores =
        new_scores(Shares::cut(shares_of(row_tiles, tiles, gpu_.multiprocessors), tiles));
    const auto starts = reinterpret_cast<uintptr_t>(task_.x) | uintptr_t(task_.dim * sizeof(T));
    const int unit = starts % 16 == 0 ? 16 : starts % 4 == 0 ? 4 : 2;
    const int stages = MmaShared::bytes(4) <= most_shared() ? 4 : 2;
    launch(kOp, gpu_, score_tensor<T>, dim3(unsigned(row_tiles), unsigned(scores.shares.count)),
           Mma::kThreads, MmaShared::bytes(stages), task_.x, task_.rows, unit, centroids_,
           scores.shares.tiles, stages, scores.found);
    return scores;
  }

  Scores score_plainly() {
    const int64_t row_tiles = ceil_div(task_.rows, int64_t{Simt<A>::kTile});
    const int64_t shares = shares_of(row_tiles, simt_tiles(), blocks_at_once());
    const Scores scores = new_scores(Shares::cut(shares, simt_tiles()));
    score_simt_on(unsigned(row_tiles * scores.shares.count), kAllRows, scores);
    return scores;
  }
  // The rows of a list, in the memory of scores that are no longer needed if it is large enough.
  Scores score_plainly(RowList list, const Scores& old) {
    // Shares of a list have at_once row tiles in all, unless there is but one share.
    const int64_t most = std::max(task_.rows, blocks_at_once() * Simt<A>::kTile);
    const bool fits = old.shares.count * task_.rows >= most;
    const Scores scores{{0, simt_tiles(), blocks_at_once()},
                        fits ? old.found : gpu_.template scratch<TopThree<A>>(most)};
    score_simt_on(unsigned(blocks_at_once()), list, scores);
    return scores;
  }

  const Centroids<A>& centroids() const { return centroids_; }
  // How many rows each stage left open; in the GPU's memory.
  const unsigned long long* left_open() const { return counts_; }

 private:
  static constexpr RowList kAllRows{nullptr, nullptr};

  int64_t blocks_at_once() const { return 2 * int64_t(gpu_.multiprocessors); }
  int64_t simt_tiles() const { return ceil_div(task_.clusters, int64_t{Simt<A>::kTile}); }
  RowList new_list(int which) const {
    return {gpu_.template scratch<int64_t>(task_.rows), counts_ + which};
  }
  Scores new_scores(Shares shares) const {
    return {shares, gpu_.template scratch<TopThree<A>>(shares.count * task_.rows)};
  }

  void score_simt_on(unsigned blocks, RowList list, const Scores& scores) {
    launch(kOp, gpu_, score_simt<T>, blocks, Simt<A>::kThreads, simt_shared<A>(), task_.x,
           task_.rows, list, centroids_, scores.shares, scores.found);
  }

  template <bool kTensor>
  void certify_labels(Scores scores, bool exact, RowList list, RowList open) {
    launch(kOp, gpu_, certify<kTensor, T>,
           grid_size(task_.rows, kSettleThreads / kWarp, 16 * int64_t(gpu_.multiprocessors)),
           kSettleThreads, 0, task_, centroids_, scores.found, scores.shares, exact, list, open);
  }

  void settle_labels(RowList open) {
    launch(kOp, gpu_, settle<T>, grid_size(task_.rows, 1, 4 * int64_t(gpu_.multiprocessors)),
           kSettleThreads, 0, task_, static_cast<const unsigned char*>(centroids_.finite), open);
  }

  const KMeansAssign<T> task_;
  const Gpu& gpu_;
  const bool tensor_;
  const Centroids<A> centroids_;
  unsigned long long* const counts_;  // lengths of the two lists
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
