// The sampling engine: one pass over rows, tile by tile, for every class at once (bottom_k.h states
// what is drawn, gate.h how most elements are dismissed).
//
// A Source knows the sizes. It needs, all const:
//   struct Tile                      scratch of one worker, default-constructible
//   load(tile, row, rows, bounds)    bounds[i * Y + y] >= size / exp(log_unit(y)) of row + i, up to
//                                    1e-4 relative; 0 where it is 0; at most 16 floats beyond the
//                                    last may be overwritten; returns how many rows are skipped;
//                                    may be called more than once for a row
//   log_unit(y)                      bounds of class y are in units of exp(log_unit(y))
//   log_size(tile, i, y)             log of the size, within accuracy(); -inf where it is 0
//   log_key(candidate, y)            log size - log arrival, the definition itself (exact_math.h)
//   accuracy()                       see log_size
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "common/bottom_k.h"
#include "common/exact_math.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "sampling/gate.h"
#include "sampling/sample.h"

namespace fastif {

constexpr int64_t kTileElements = 2048;
constexpr int64_t kTaskElements = 1 << 16;
// See probe_floors.
constexpr int64_t kProbeGroups = 1024, kProbeRows = 4, kFewGroups = 256, kManyClasses = 8;

// What one thread holds while it works through tasks: its own finalists of every class.
template <class Source>
class DrawWorker {
 public:
  // Starts from floors[y], below which nothing is taken.
  DrawWorker(const Source& source, const Draw& draw, int64_t tile_rows,
             std::vector<std::atomic<double>>& floors)
      : source_(source),
        draw_(draw),
        bounds_(tile_rows * draw.classes + 2 * kGateBlock + kGateLanes),
        limits_(draw.classes + kGateLanes, std::numeric_limits<float>::infinity()),
        index_(bounds_.size()),
        word_(bounds_.size()),
        pools_(draw.classes, BottomK(draw.k + 1, source.accuracy())) {
    share(floors);
  }

  // Floors of one worker hold for all; a stale one only admits more.
  void share(std::vector<std::atomic<double>>& floors) {
    for (int64_t y = 0; y < draw_.classes; ++y) {
      const double own = pools_[y].floor();
      double common = floors[y].load(std::memory_order_relaxed);
      if (common > own) {
        pools_[y].raise_floor(common);
        update_limit(y);
      }
      while (own > common &&
             !floors[y].compare_exchange_weak(common, own, std::memory_order_relaxed)) {
      }
    }
  }

  void process(int64_t row, int64_t rows) {
    const int64_t Y = draw_.classes;
    const uint64_t first = (draw_.row_offset + uint64_t(row)) * uint64_t(Y);
    const int64_t lead = int64_t(first % kGateBlock), end = lead + rows * Y;
    const int64_t blocks = ceil_div(end, kGateBlock);
    skipped_ += source_.load(tile_, row, rows, bounds_.data() + lead);
    std::fill(bounds_.begin(), bounds_.begin() + lead, 0.0f);
    std::fill(bounds_.begin() + end, bounds_.begin() + blocks * kGateBlock, 0.0f);
    const int64_t hits = gate(draw_.seed, first / kGateBlock, blocks, bounds_.data(),
                              limits_.data(), Y, (Y - lead % Y) % Y, index_.data(), word_.data());
    for (int64_t h = 0; h < hits; ++h) {
      if (!(bounds_[index_[h]] > 0)) continue;
      const uint32_t element = index_[h] - uint32_t(lead);
      const int64_t i = element / uint32_t(Y), y = element % uint32_t(Y);
      // The limit may have fallen since the gate read it.
      if (!(float(word_[h] >> 1) <= bounds_[index_[h]] * limits_[y])) continue;
      const double u = uniform_from_word(word_[h], draw_.seed, first + element);
      arrive(first + element, row + i, y, source_.log_size(tile_, i, y), exponential(u));
    }
  }

  const BottomK& pool(int64_t y) const { return pools_[y]; }
  int64_t skipped() const { return skipped_; }

 private:
  void arrive(uint64_t element, int64_t row, int64_t y, double log_size, double arrival) {
    if (!(log_size > -std::numeric_limits<double>::infinity())) return;
    // No sample of k + 1 arrivals has more than k + 1 of one row.
    const int64_t arrivals = draw_.replacement ? draw_.k + 1 : 1;
    for (int64_t j = 1;; ++j) {
      const double key = log_size - exact_log(arrival);
      if (key < pools_[y].floor()) return;
      if (pools_[y].push({key, arrival, row})) update_limit(y);
      if (j == arrivals) return;
      arrival += exponential(uniform(draw_.seed, element, uint32_t(j)));
    }
  }

  void update_limit(int64_t y) {
    const double accuracy = source_.accuracy();
    const double limit = std::exp(source_.log_unit(y) - pools_[y].floor()) *
                         (kGateUnit * kGateMargin * (1 + 2 * accuracy));
    const double low = std::numeric_limits<float>::min(), high = std::numeric_limits<float>::max();
    const float rounded = limit > high  ? std::numeric_limits<float>::infinity()
                          : limit < low ? float(low)
                                        : float(limit);
    for (int64_t i = y; i < int64_t(limits_.size()); i += draw_.classes) limits_[i] = rounded;
  }

  const Source& source_;
  const Draw draw_;
  typename Source::Tile tile_;
  std::vector<float> bounds_, limits_;
  std::vector<uint32_t> index_, word_;
  std::vector<BottomK> pools_;
  int64_t skipped_ = 0;
};

// Orders the finalists of one class by their final keys and writes its sample.
template <class Source>
void write_sample(const Source& source, const Draw& draw, const BottomK& pool, int64_t y,
                  const Sample& out) {
  struct Final {
    float key;
    int64_t row;
  };
  std::vector<Final> finals;
  for (const Candidate& c : pool.candidates())
    finals.push_back({float(source.log_key(c, y)), c.row});
  const int64_t kept = std::min<int64_t>(draw.k, int64_t(finals.size()));
  const auto before = [](const Final& a, const Final& b) {
    return a.key > b.key || (a.key == b.key && a.row < b.row);
  };
  std::sort(finals.begin(), finals.end(), before);
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < draw.k; ++j) {
    out.rows[y * draw.k + j] = j < kept ? int64_t(draw.row_offset) + finals[j].row : -1;
    out.log_keys[y * draw.k + j] = j < kept ? finals[j].key : kNone;
  }
  out.log_threshold[y] = int64_t(finals.size()) > draw.k ? finals[draw.k].key : kNone;
}

// Floors that hold about twice the candidates that are needed, or -inf for a class of which too
// little is known: from the sizes in some groups of rows spread over all. They are guesses,
// to be checked against the number of candidates found; without them a class takes in
// (k + 1) log2(n / k) candidates until its own floor has risen. A few rows are looked at where many
// classes gain by them, however few there are; else a sixteenth.
template <class Source>
std::vector<double> probe_floors(const Source& source, const Draw& draw, int64_t n) {
  const int64_t Y = draw.classes;
  const int64_t few = Y >= kManyClasses ? std::min(kFewGroups, n / kProbeRows) : 0;
  const int64_t groups = std::min(kProbeGroups, std::max(few, n / (16 * kProbeRows)));
  std::vector<double> floors(Y, -std::numeric_limits<double>::infinity());
  if (groups < 64) return floors;
  std::vector<double> sum(Y, 0.0), row_sq(Y, 0.0), group_sq(Y, 0.0), group(Y);
  std::vector<float> bounds(kProbeRows * Y + kGateLanes);
  typename Source::Tile tile;
  for (int64_t g = 0; g < groups; ++g) {
    source.load(tile, n / groups * g, kProbeRows, bounds.data());
    std::fill(group.begin(), group.end(), 0.0);
    for (int64_t i = 0; i < kProbeRows; ++i) {
      for (int64_t y = 0; y < Y; ++y) {
        const double size = bounds[i * Y + y];
        group[y] += size;
        row_sq[y] += size * size;
      }
    }
    for (int64_t y = 0; y < Y; ++y) {
      sum[y] += group[y];
      group_sq[y] += group[y] * group[y];
    }
  }
  const double needed = double(draw.k) + 1, scale = double(n) / double(groups * kProbeRows);
  for (int64_t y = 0; y < Y; ++y) {
    // As many equal groups, and rows of all, would have the same spread.
    const bool known = sum[y] * sum[y] >= 64 * group_sq[y] && sum[y] > 0;
    const bool plenty = draw.replacement || sum[y] * sum[y] * scale >= 8 * needed * row_sq[y];
    if (known && plenty)
      floors[y] = source.log_unit(y) - std::log((2 * needed + 12) / (sum[y] * scale));
  }
  return floors;
}

// One pass over rows 0 ... n - 1, from the floors given: the candidates of each class. Workers are
// handed from task to task, so there are as many as threads, and extra memory is O(threads * k *
// Y).
template <class Source>
std::vector<std::unique_ptr<DrawWorker<Source>>> scan(const Source& source, const Draw& draw,
                                                      int64_t n,
                                                      const std::vector<double>& initial_floors,
                                                      const Pool& pool) {
  using Worker = DrawWorker<Source>;
  const int64_t Y = draw.classes;
  const int64_t tile = std::max<int64_t>(1, kTileElements / Y);
  const int64_t task = tile * std::max<int64_t>(1, kTaskElements / (tile * Y));
  std::mutex mutex;
  std::vector<std::unique_ptr<Worker>> workers;
  std::vector<Worker*> idle;
  std::vector<std::atomic<double>> floors(Y);
  for (int64_t y = 0; y < Y; ++y) floors[y] = initial_floors[y];

  parallel_tasks(pool, ceil_div(n, task), [&](int64_t index) {
    Worker* worker = nullptr;
    {
      const std::lock_guard lock(mutex);
      if (!idle.empty()) {
        worker = idle.back();
        idle.pop_back();
      }
    }
    if (worker == nullptr) {
      auto fresh = std::make_unique<Worker>(source, draw, std::min(tile, n), floors);
      worker = fresh.get();
      const std::lock_guard lock(mutex);
      workers.push_back(std::move(fresh));
    }
    worker->share(floors);
    const int64_t end = std::min(n, (index + 1) * task);
    for (int64_t row = index * task; row < end; row += tile)
      worker->process(row, std::min(tile, end - row));
    const std::lock_guard lock(mutex);
    idle.push_back(worker);
  });
  return workers;
}

// Draws the sample of rows 0 ... n - 1. Returns how many of them were skipped.
template <class Source>
int64_t draw_sample(const Source& source, const Draw& draw, int64_t n, const Sample& out,
                    const Pool& pool) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const int64_t Y = draw.classes;
  if (Y == 0) return 0;
  std::vector<double> floors = probe_floors(source, draw, n);
  while (true) {
    const auto workers = scan(source, draw, n, floors, pool);
    const int64_t group = std::max<int64_t>(1, 1024 / (draw.k + 1));
    std::atomic<bool> again = false;
    parallel_tasks(pool, ceil_div(Y, group), [&](int64_t index) {
      for (int64_t y = index * group; y < std::min(Y, (index + 1) * group); ++y) {
        if (floors[y] == kInfinity) continue;  // was written in the pass before
        BottomK merged(draw.k + 1, source.accuracy());
        for (const auto& worker : workers) merged.append(worker->pool(y));
        merged.compact();
        if (merged.floor() < floors[y]) {
          floors[y] = -kInfinity;  // the guess was too high: a second pass without it
          again = true;
        } else {
          write_sample(source, draw, merged, y, out);
          floors[y] = kInfinity;
        }
      }
    });
    if (again) continue;
    int64_t skipped = 0;
    for (const auto& worker : workers) skipped += worker->skipped();
    return skipped;
  }
}

}  // namespace fastif
