#include <algorithm>

#include "common/aligned.h"
#include "common/flush_denormals.h"
#include "common/simd_levels.h"
#include "hvp/linear_softmax_hvp.h"
#include "hvp/small_product.h"
#include "hvp/softmax_hvp.h"

namespace fastif {
namespace {

// A multiple of every level's tile of rows. A block of 512 columns takes 330 kB of cache; with 48
// rows it would be 5 % slower.
constexpr int64_t kBlockRows = 144;

// Columns of x go through in strips of kStrip, staged with kStride between rows: a constant, and
// not a power of two, so that the rows of a strip lie in different sets of the first-level cache.
template <class A>
inline constexpr int64_t kLine = 64 / int64_t(sizeof(A));
template <class A>
inline constexpr int64_t kStrip = 8 * kLine<A>;
template <class A>
inline constexpr int64_t kStride = kStrip<A> + kLine<A>;

// Sums that are kept apart, as long as they take little memory: a task each.
int64_t groups_of(int64_t blocks, int64_t elements) {
  return std::min(blocks, std::clamp<int64_t>((1 << 24) / elements, 2, 16));
}

int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

template <class A>
struct Shape {
  int64_t columns;  // d', with the bias
  int64_t outputs;  // R C
  int64_t strips = ceil_div(columns, kStrip<A>);
  int64_t width = round_up(columns, kLine<A>);   // of a row of the sums
  int64_t spread = round_up(outputs, kLine<A>);  // of a row of z and u

  int64_t strip_columns(int64_t strip) const {
    return std::min(kStrip<A>, columns - strip * kStrip<A>);
  }
};

template <class L, class T>
FASTIF_INLINE void convert_body(const T* from, accumulate_t<T>* to, int64_t count) {
  constexpr int kLanes = L::width / int(sizeof(accumulate_t<T>));
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store_vector(to + k, load_lanes<L>(from + k));
  for (; k < count; ++k) to[k] = to_float(from[k]);
}
FASTIF_LEVELS(convert, convert_body)

// Rows of x, extended by a one for the bias and by zeros to whole cache lines.
template <class T>
void stage_rows(const LinearSoftmaxHvp<T>& task, const Shape<accumulate_t<T>>& shape, int64_t row,
                int64_t rows, accumulate_t<T>* staged) {
  using A = accumulate_t<T>;
  for (int64_t strip = 0; strip < shape.strips; ++strip) {
    const int64_t begin = strip * kStrip<A>, columns = shape.strip_columns(strip);
    const int64_t copied = std::min(columns, task.dim - begin);
    for (int64_t i = 0; i < rows; ++i, staged += kStride<A>) {
      convert(task.x + (row + i) * task.dim + begin, staged, copied);
      std::fill(staged + copied, staged + columns, A(1));
      std::fill(staged + columns, staged + round_up(columns, kLine<A>), A(0));
    }
    staged += (kBlockRows - rows) * kStride<A>;
  }
}

// Adds the terms of rows begin ... end - 1 to sum [outputs, width]. slope: v transposed.
template <class T>
void add_rows(const LinearSoftmaxHvp<T>& task, const Shape<accumulate_t<T>>& shape,
              const accumulate_t<T>* slope, int64_t begin, int64_t end, accumulate_t<T>* sum) {
  using A = accumulate_t<T>;
  const FlushDenormals<T> flush;
  const int64_t C = task.classes, strip_size = kBlockRows * kStride<A>;
  const Scratch<A> staged(shape.strips * strip_size), p(kBlockRows * C);
  const Scratch<A> z(kBlockRows * shape.spread), u(kBlockRows * shape.spread);
  for (int64_t row = begin; row < end; row += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, end - row);
    stage_rows(task, shape, row, rows, staged.get());
    convert(task.probs + row * C, p.get(), rows * C);
    for (int64_t strip = 0; strip < shape.strips; ++strip) {
      small::Product<A> product{rows,
                                shape.spread,
                                shape.strip_columns(strip),
                                staged.get() + strip * strip_size,
                                1,
                                slope + strip * kStrip<A> * shape.spread,
                                shape.spread,
                                z.get(),
                                shape.spread,
                                strip > 0};
      if (row + 2 * kBlockRows <= end) {
        product.ahead = reinterpret_cast<const char*>(task.x + (row + kBlockRows) * task.dim +
                                                      strip * rows * kStrip<A>);
        product.ahead_bytes = sizeof(T);
      }
      small::multiply<kStride<A>>(product);
    }
    softmax_hvp_rows(SoftmaxHvp<A>{rows, C, task.right_hand_sides, p.get(), z.get(),
                                   task.weight == nullptr ? nullptr : task.weight + row, u.get(),
                                   shape.spread, C},
                     0, rows);
    for (int64_t strip = 0; strip < shape.strips; ++strip) {
      small::multiply<1>(small::Product<A>{shape.outputs,
                                           round_up(shape.strip_columns(strip), kLine<A>), rows,
                                           u.get(), shape.spread, staged.get() + strip * strip_size,
                                           kStride<A>, sum + strip * kStrip<A>, shape.width, true});
    }
  }
}

}  // namespace

template <class T>
void linear_softmax_hvp_cpu(const LinearSoftmaxHvp<T>& task, const Pool& pool) {
  using A = accumulate_t<T>;
  const int64_t columns = task.dim + task.bias;
  const Shape<A> shape{columns, task.right_hand_sides * task.classes};
  if (shape.outputs * columns == 0) return;
  const Scratch<A> slope(columns * shape.spread);
  for (int64_t k = 0; k < columns; ++k) {
    A* row = slope.get() + k * shape.spread;
    for (int64_t o = 0; o < shape.outputs; ++o) row[o] = task.v[o * columns + k];
    std::fill(row + shape.outputs, row + shape.spread, A(0));
  }

  const int64_t blocks = ceil_div(task.n, kBlockRows);
  const int64_t groups = groups_of(blocks, shape.outputs * columns);
  const int64_t sum_size = shape.outputs * shape.width;
  const Scratch<A> sums(groups * sum_size);
  parallel_tasks(pool, groups, [&](int64_t group) {
    A* sum = sums.get() + group * sum_size;
    std::fill(sum, sum + sum_size, A(0));
    const int64_t first = blocks * group / groups, last = blocks * (group + 1) / groups;
    add_rows(task, shape, slope.get(), first * kBlockRows, std::min(task.n, last * kBlockRows),
             sum);
  });
  parallel_tasks(pool, shape.outputs, [&](int64_t o) {
    A* out = task.result + o * columns;
    std::fill(out, out + columns, A(0));
    for (int64_t group = 0; group < groups; ++group) {
      const A* sum = sums.get() + group * sum_size + o * shape.width;
      for (int64_t k = 0; k < columns; ++k) out[k] += sum[k];
    }
  });
}

template void linear_softmax_hvp_cpu(const LinearSoftmaxHvp<float>&, const Pool&);
template void linear_softmax_hvp_cpu(const LinearSoftmaxHvp<double>&, const Pool&);
template void linear_softmax_hvp_cpu(const LinearSoftmaxHvp<Half>&, const Pool&);
template void linear_softmax_hvp_cpu(const LinearSoftmaxHvp<BFloat16>&, const Pool&);

}  // namespace fastif
