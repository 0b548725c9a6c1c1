#include "kmeans/kmeans_update.h"

#include <algorithm>
#include <vector>

#include "common/aligned.h"
#include "common/clones.h"
#include "common/simd.h"
#include "kmeans/clusters.h"

namespace fastif {
namespace {

constexpr int64_t kPiece = kUpdatePiece;
constexpr int64_t kPrefetch = 512;  // bytes at the head of a row; the hardware fetches the rest

// sum[k] += sum over i of weight[i] * x[row[i]][k], for `count` <= 4 rows.
template <class T>
FASTIF_CLONES void add_rows(const T* x, int64_t dim, const int64_t* rows, int64_t count,
                            const accumulate_t<T>* weight, accumulate_t<T>* __restrict sum) {
  using A = accumulate_t<T>;
  constexpr int64_t kLanes = kUpdateLanes<T>;
  static_assert(kLanes == Simd<T>::lanes);
  const T* r[4];
  A w[4];
  for (int64_t i = 0; i < count; ++i) {
    r[i] = x + rows[i] * dim;
    w[i] = weight != nullptr ? weight[rows[i]] : A(1);
  }
  int64_t k = 0;
  if (count == 4 && weight == nullptr) {
    for (; k + kLanes <= dim; k += kLanes) {
      store(sum + k, load(sum + k) +
                         ((load(r[0] + k) + load(r[1] + k)) + (load(r[2] + k) + load(r[3] + k))));
    }
  } else if (count == 4) {
    for (; k + kLanes <= dim; k += kLanes) {
      store(sum + k, load(sum + k) + ((w[0] * load(r[0] + k) + w[1] * load(r[1] + k)) +
                                      (w[2] * load(r[2] + k) + w[3] * load(r[3] + k))));
    }
  } else {
    for (; k + kLanes <= dim; k += kLanes) {
      auto total = load(sum + k);
      for (int64_t i = 0; i < count; ++i) total += w[i] * load(r[i] + k);
      store(sum + k, total);
    }
  }
  for (; k < dim; ++k) {
    A total = 0;
    for (int64_t i = 0; i < count; ++i) total += w[i] * A(to_float(r[i][k]));
    sum[k] += total;
  }
}

// The sum of rows order[begin .. end).
template <class T>
void sum_piece(const KMeansUpdate<T>& task, const int64_t* order, int64_t begin, int64_t end,
               int64_t readable, accumulate_t<T>* sum) {
  std::fill(sum, sum + task.dim, accumulate_t<T>(0));
  const int64_t head = std::min<int64_t>(task.dim * int64_t(sizeof(T)), kPrefetch);
  for (int64_t i = begin; i < end; i += 4) {
    for (int64_t ahead = i + 4; ahead < std::min(i + 8, readable); ++ahead) {
      const char* row = reinterpret_cast<const char*>(task.x + order[ahead] * task.dim);
      for (int64_t byte = 0; byte < head; byte += 64) __builtin_prefetch(row + byte);
    }
    add_rows(task.x, task.dim, order + i, std::min<int64_t>(end - i, 4), task.weight, sum);
  }
}

}  // namespace

template <class T>
int64_t kmeans_update_cpu(const KMeansUpdate<T>& task, const Pool& pool) {
  using A = accumulate_t<T>;
  const Clusters groups = group_rows(task.labels, task.rows, task.clusters);
  if (groups.bad_row >= 0) return groups.bad_row;
  const int64_t grouped = int64_t(groups.order.size()), dim = task.dim;

  // Clusters of one piece are summed in place, the pieces of others in rows of `partial`.
  struct Piece {
    int64_t begin, end;
    A* sum;
  };
  std::vector<Piece> pieces;
  std::vector<int64_t> partials(task.clusters + 1, 0);
  for (int64_t j = 0; j < task.clusters; ++j) {
    task.counts[j] = groups.start[j + 1] - groups.start[j];
    const int64_t n = ceil_div(task.counts[j], kPiece);
    partials[j + 1] = partials[j] + (n > 1 ? n : 0);
  }
  const Scratch<A> partial(partials[task.clusters] * dim);
  for (int64_t j = 0; j < task.clusters; ++j) {
    const int64_t begin = groups.start[j], end = groups.start[j + 1];
    if (end - begin <= kPiece) {
      pieces.push_back({begin, end, task.sums + j * dim});
      continue;
    }
    A* sum = partial.get() + partials[j] * dim;
    for (int64_t i = begin; i < end; i += kPiece, sum += dim) {
      pieces.push_back({i, std::min(end, i + kPiece), sum});
    }
  }
  parallel_tasks(pool, int64_t(pieces.size()), [&](int64_t index) {
    const Piece& piece = pieces[index];
    sum_piece(task, groups.order.data(), piece.begin, piece.end, grouped, piece.sum);
  });
  if (partials[task.clusters] > 0) {
    parallel_tasks(pool, task.clusters, [&](int64_t j) {
      if (partials[j + 1] == partials[j]) return;
      for (int64_t k = 0; k < dim; ++k) {
        double total = 0;
        for (int64_t p = partials[j]; p < partials[j + 1]; ++p) {
          total += partial.get()[p * dim + k];
        }
        task.sums[j * dim + k] = A(total);
      }
    });
  }
  return -1;
}

template int64_t kmeans_update_cpu(const KMeansUpdate<float>&, const Pool&);
template int64_t kmeans_update_cpu(const KMeansUpdate<double>&, const Pool&);
template int64_t kmeans_update_cpu(const KMeansUpdate<Half>&, const Pool&);
template int64_t kmeans_update_cpu(const KMeansUpdate<BFloat16>&, const Pool&);

}  // namespace fastif
