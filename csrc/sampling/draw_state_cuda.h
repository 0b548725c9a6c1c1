// What the kernels of the sampling engine on a GPU share: the order of candidates, the state of
// each class, and the tiles in which elements are gone through. draw_cuda.h tells how they combine.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/fast_divide.h"
#include "common/launch.h"
#include "sampling/gate.h"
#include "sampling/sample.h"

namespace fastif {

constexpr int kDrawThreads = 256;
constexpr int kDrawTile = 4096;  // elements
constexpr unsigned long long kNoRow = ~0ull;

// Candidates in the order of a sample: a key's code is the smaller the larger the key, and equal
// codes go by row.
__device__ __forceinline__ uint32_t key_code(float key) {
  const uint32_t bits = __float_as_uint(key + 0.0f);  // one zero
  return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}
__device__ __forceinline__ float key_of_code(uint32_t code) {
  return __uint_as_float(code & 0x80000000u ? code : ~code & 0x7fffffffu);
}
constexpr uint32_t kEveryCode = ~0u;  // above the code of every key

// Class y takes in candidates up to (code[y], row[y]), at most `capacity` of them.
struct DrawState {
  int64_t classes, k, capacity;
  uint32_t* code;             // [Y]
  unsigned long long* row;    // [Y]
  float* limit;               // [Y] of the gate, for these; negative: takes in nothing
  unsigned long long* count;  // [Y] candidates there were; those past `capacity` are not kept
  uint32_t* entry_code;       // [Y, capacity]
  unsigned long long* entry_row;
  unsigned long long* bad;      // the first row (or element) that makes the draw undefined
  unsigned long long* skipped;  // rows that were skipped

  __device__ __forceinline__ bool takes(int64_t y, uint32_t c, unsigned long long r) const {
    return c < code[y] || (c == code[y] && r <= row[y]);
  }
};

// The gate's limit for candidates up to a code, when bounds are in units of exp(log_unit). Bounds
// may be wrong by 1e-4, and a key by its rounding to float.
__device__ inline float gate_limit(uint32_t code, double log_unit) {
  const double key = key_of_code(code);
  if (code == kEveryCode || !(key > -1e6)) return std::numeric_limits<float>::infinity();
  const double limit =
      std::exp(log_unit - key) * (kGateUnit * 1.0003 * (1 + std::abs(key) * 0x1p-22));
  const double low = std::numeric_limits<float>::min(), high = std::numeric_limits<float>::max();
  return limit > high  ? std::numeric_limits<float>::infinity()
         : limit < low ? float(low)
                       : float(limit);
}

struct DrawTile {
  int64_t row, line;  // its first
  int rows;           // at least 1
  int lines;
  uint64_t first;  // element (row, line), global
};

// Cuts rows x lines into tiles of at most `rows` x `lines`. A tile is a list of runs of consecutive
// elements: one if it has whole rows, else one for each row. Each run starts in a block of 64
// elements (philox.h) of its own, at slot `lead` of it, so that a thread handles the four elements
// of a Philox counter.
struct DrawPlan {
  int64_t n, classes;
  uint64_t row_offset;
  int rows, lines;
  int64_t row_tiles, line_tiles;
  int64_t row_step;  // from tile to tile: rows, or more for a probe
  bool whole;        // lines == classes
  int runs, pitch;   // slots of a run
  FastDivide by_lines, by_rows, by_pitch, by_counters;

  DrawPlan(const Draw& draw, int64_t n_, int rows_, int lines_)
      : n(n_),
        classes(draw.classes),
        row_offset(draw.row_offset),
        rows(int(std::clamp<int64_t>(n_, 1, rows_))),
        lines(lines_),
        row_tiles(ceil_div(n_, rows)),
        line_tiles(ceil_div(draw.classes, lines_)),
        row_step(rows),
        whole(lines_ == draw.classes),
        runs(whole ? 1 : rows),
        pitch(int(ceil_div((whole ? rows * lines : lines) + kGateBlock - 1, kGateBlock)) *
              int(kGateBlock)),
        by_lines(lines),
        by_rows(rows),
        by_pitch(pitch),
        by_counters(pitch / 4) {}

  // Only `tiles` of the row tiles, spread over all rows.
  DrawPlan spread(int64_t tiles) const {
    DrawPlan plan = *this;
    plan.row_tiles = std::min(row_tiles, tiles);
    if (plan.row_tiles < row_tiles) plan.row_step = n / plan.row_tiles;
    return plan;
  }
  int64_t tiles() const { return row_tiles * line_tiles; }
  int slots() const { return runs * pitch; }
  size_t shared_bytes() const { return size_t(slots()) * (sizeof(float) + sizeof(uint16_t)); }

  __device__ DrawTile tile(int64_t index) const {
    const int64_t row_tile = index / line_tiles;
    DrawTile t;
    t.row = row_tile * row_step;
    t.line = (index - row_tile * line_tiles) * lines;
    t.rows = int(n - t.row < rows ? n - t.row : rows);
    t.lines = int(classes - t.line < lines ? classes - t.line : lines);
    t.first = (row_offset + uint64_t(t.row)) * uint64_t(classes) + uint64_t(t.line);
    return t;
  }
  __device__ int run_count(const DrawTile& t) const { return whole ? 1 : t.rows; }
  __device__ int run_length(const DrawTile& t) const { return whole ? t.rows * lines : t.lines; }
  __device__ uint64_t run_first(const DrawTile& t, int run) const {
    return t.first + uint64_t(run) * uint64_t(classes);
  }
  __device__ int lead(const DrawTile& t, int run) const {
    return int((uint32_t(t.first) + uint32_t(run) * uint32_t(classes)) % uint32_t(kGateBlock));
  }
  __device__ int slot(const DrawTile& t, int r, int l) const {
    return whole ? lead(t, 0) + r * lines + l : r * pitch + lead(t, r) + l;
  }
  __device__ void place(const DrawTile& t, int slot, int* r, int* l) const {
    if (whole) {
      const int offset = slot - lead(t, 0);
      *r = int(by_lines.quotient(unsigned(offset)));
      *l = offset - *r * lines;
    } else {
      *r = int(by_pitch.quotient(unsigned(slot)));
      *l = slot - *r * pitch - lead(t, *r);
    }
  }
};

}  // namespace fastif
