// The sampling engine on a GPU: draw.h's definition, the same rows and keys, without waiting for
// the device. common/bottom_k.h states what is drawn.
//
//   probe, start   a guess for each class up to which candidate to take them in
//   (draw_select_cuda.h) pass           one reading of all elements, which keeps the candidates
//   (draw_arrivals_cuda.h) finish         sorts and writes the classes that have between k + 1 and
//   `capacity` of them fallback       for the other classes, if there are any: the exact answer by
//   radix select, and
//                  a second pass. Its kernels are always launched; without such classes they return
//                  at once.
//
// Every key is final when it is compared first, in float32, so no choice depends on the order in
// which candidates come.
#pragma once

#include "sampling/draw_select_cuda.h"
#include "sampling/draw_sort_cuda.h"

namespace fastif {

struct DrawOutput {
  Sample sample;
  int64_t* skipped;  // or null
  uint64_t row_offset;
};

// One block to a class: writes its sample, or opens it to the fallback. What makes a draw undefined
// leaves rows -1, log_keys and log_threshold NaN, and skipped -(1 + bad).
static __global__ void __launch_bounds__(kDrawThreads)
    finish_classes(DrawState state, DrawSelect select, DrawOutput out, bool again, bool sorted) {
  if (again && *select.open == 0) return;
  __shared__ uint32_t codes[kSortChunk];
  __shared__ unsigned long long rows[kSortChunk];
  const int64_t k = state.k;
  const unsigned long long bad = *state.bad;
  if (!again && out.skipped != nullptr && blockIdx.x == 0 && threadIdx.x == 0)
    *out.skipped = bad == kNoRow ? int64_t(*state.skipped) : -1 - int64_t(bad);
  for (int64_t y = blockIdx.x; y < state.classes; y += gridDim.x) {
    if (again && !select.classes[y].open) continue;
    const unsigned long long count = state.count[y];
    const bool every = state.code[y] == kEveryCode || again;
    const bool settled = count <= static_cast<unsigned long long>(state.capacity) &&
                         (every || count > static_cast<unsigned long long>(k));
    if (!settled && bad == kNoRow) {
      for (int i = threadIdx.x; i < kDigits; i += kDrawThreads)
        select.histogram[y * kDigits + i] = 0;
      __syncthreads();  // all have read the state
      if (threadIdx.x == 0) {
        select.classes[y] = {0, 0, 0, kEveryCode, true, false};
        state.code[y] = kEveryCode;
        state.row[y] = kNoRow;
        state.limit[y] = std::numeric_limits<float>::infinity();
        state.count[y] = 0;
        atomicAdd(select.open, 1u);
        atomicAdd(select.unsettled, 1u);
      }
      continue;
    }
    if (!again && threadIdx.x == 0) {
      select.classes[y] = {0, 0, 0, kEveryCode, false, false};
      state.limit[y] = select.keep_limit[y] = -1;
    }
    const int64_t kept = bad != kNoRow ? 0 : int64_t(count);
    const uint32_t* code = state.entry_code + y * state.capacity;
    const unsigned long long* row = state.entry_row + y * state.capacity;
    if (!sorted) {
      int length = 2;
      while (length < kept) length *= 2;
      for (int i = threadIdx.x; i < length; i += kDrawThreads) {
        codes[i] = i < kept ? code[i] : kEveryCode;
        rows[i] = i < kept ? row[i] : kNoRow;
      }
      sort_steps(codes, rows, 0, length, 2, length);
      code = codes;
      row = rows;
    }
    const float none = bad != kNoRow ? std::numeric_limits<float>::quiet_NaN()
                                     : -std::numeric_limits<float>::infinity();
    for (int64_t j = threadIdx.x; j <= k; j += kDrawThreads) {
      const float key = j < kept ? key_of_code(code[j]) : none;
      if (j == k) {
        out.sample.log_threshold[y] = key;
      } else {
        out.sample.rows[y * k + j] = j < kept ? int64_t(out.row_offset + row[j]) : -1;
        out.sample.log_keys[y * k + j] = key;
      }
    }
    __syncthreads();
  }
}

// Draws from the sizes of a Source (see draw_arrivals). `probe` is the plan of the tiles for the
// first guess: few rows each, so that they spread. bad[0] holds kNoRow, or what makes the draw
// undefined; skipped[0] what is skipped already.
template <class Source>
void draw_sample_cuda(const char* op, const Gpu& gpu, const Source& source, const Draw& draw,
                      const DrawPlan& plan, const DrawPlan& probe, const DrawOutput& out,
                      unsigned long long* bad, unsigned long long* skipped) {
  const int64_t Y = draw.classes, n = plan.n, most = 8 * int64_t(gpu.multiprocessors);
  const int64_t arrivals = draw.replacement ? draw.k + 1 : 1;
  // A guess aims at 2 (k + 1) + 12; samples with replacement end on at most 2 k + 1.
  int64_t capacity = 6 * (draw.k + 1) + 128;
  if (!draw.replacement) capacity = std::min(capacity, std::max<int64_t>(n, 1));
  const bool every = !draw.replacement && capacity == std::max<int64_t>(n, 1);
  const bool large = capacity > kSortChunk;
  if (large) {
    int64_t power = kSortChunk;
    while (power < capacity) power *= 2;
    capacity = power;
  }
  const DrawState state{Y,
                        draw.k,
                        capacity,
                        gpu.scratch<uint32_t>(Y),
                        gpu.scratch<unsigned long long>(Y),
                        gpu.scratch<float>(Y),
                        gpu.scratch<unsigned long long>(Y),
                        gpu.scratch<uint32_t>(Y * capacity),
                        gpu.scratch<unsigned long long>(Y * capacity),
                        bad,
                        skipped};
  DrawSelect select{};
  while (select.row_passes < 7 && n >> (8 * select.row_passes) > 0) ++select.row_passes;
  const int passes = select.passes(), counters = 1 + 2 * (passes + 1);
  unsigned* counter = gpu.scratch<unsigned>(counters);
  fill_bytes(op, gpu, counter, 0, counters * int64_t(sizeof(unsigned)));
  select.open = counter;
  select.unsettled = counter + 1;
  select.classes = gpu.scratch<ClassSelect>(Y);
  select.keep_limit = gpu.scratch<float>(Y);
  select.histogram = gpu.scratch<unsigned long long>(every ? 1 : Y * kDigits);

  const unsigned by_class = grid_size(Y, kDrawThreads, most);
  ProbeSums sums{nullptr, 0};
  double scale = 1;
  if (!every && n > 0) {
    // About 64 rows of each class, if rows belong to one each; all of a small n.
    const int64_t rows = std::max<int64_t>(4096, std::min(n / 16, 64 * Y));
    const DrawPlan spread = probe.spread(ceil_div(rows, probe.rows));
    const int64_t line_blocks = std::min<int64_t>(spread.line_tiles, 65535);
    sums.blocks = std::min(spread.row_tiles, std::max<int64_t>(1, most / line_blocks));
    sums.sums = gpu.scratch<double>(sums.blocks * 3 * Y);
    if (spread.row_tiles < probe.row_tiles)
      scale = double(n) / double(spread.row_tiles * probe.rows);
    launch(op, gpu, probe_sizes<Source>, dim3(unsigned(sums.blocks), unsigned(line_blocks)),
           kDrawThreads, spread.shared_bytes(), source, spread, sums);
  }
  launch(op, gpu, start_classes<Source>, by_class, kDrawThreads, 0, source, state, sums, scale,
         draw.replacement);

  auto pass = [&](const auto& sink, const DrawState& from, int64_t looked_at) {
    launch(op, gpu, draw_arrivals<Source, std::decay_t<decltype(sink)>>,
           grid_size(plan.tiles(), 1, 4 * most), kDrawThreads, plan.shared_bytes(), source, plan,
           from, draw.seed, looked_at, sink);
  };
  auto finish = [&](bool again) {
    if (large) sort_entries(op, gpu, state);
    launch(op, gpu, finish_classes, grid_size(Y, 1, most), kDrawThreads, 0, state, select, out,
           again, large);
  };
  pass(KeepCandidates{nullptr}, state, arrivals);
  finish(false);
  if (every) return;

  const unsigned warps = grid_size(Y, kDrawThreads / kWarp, most);
  auto select_exactly = [&](int64_t looked_at) {
    for (int p = 0; p < passes; ++p) {
      pass(CountDigits{select.unsettled + p, select, p}, state, looked_at);
      launch(op, gpu, select_digit<Source>, warps, kDrawThreads, 0, source, state, select, p);
    }
  };
  select_exactly(1);
  if (draw.replacement) {
    unsigned* second = select.unsettled + passes + 1;
    launch(op, gpu, select_again<Source>, by_class, kDrawThreads, 0, source, state, select, second);
    select.unsettled = second;
    select_exactly(arrivals);
  }
  DrawState keep = state;
  keep.limit = select.keep_limit;
  pass(KeepCandidates{select.open}, keep, arrivals);
  finish(true);
}

}  // namespace fastif
