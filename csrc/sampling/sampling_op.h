// What the sampling *_op.cpp files share.
#pragma once

#include <limits>
#include <optional>

#include "common/run_on.h"
#include "sampling/sample.h"

namespace fastif {

// Checks what every draw needs: counts in range, and element ids that fit in 64 bits.
inline Draw make_draw(const char* op, int64_t n, int64_t classes, int64_t k, bool replacement,
                      int64_t seed, int64_t row_offset) {
  STD_TORCH_CHECK(k >= 0, op, ": the number of draws must not be negative, got ", k);
  STD_TORCH_CHECK(!replacement || k < std::numeric_limits<uint32_t>::max(), op,
                  ": at most 2^32 - 2 draws with replacement, got ", k);
  STD_TORCH_CHECK(classes < (int64_t{1} << 31), op, ": at most 2^31 - 1 classes, got ", classes);
  STD_TORCH_CHECK(
      row_offset >= 0 && row_offset <= std::numeric_limits<int64_t>::max() - n &&
          (classes == 0 ||
           uint64_t(row_offset + n) <= std::numeric_limits<uint64_t>::max() / uint64_t(classes)),
      op, ": row_offset must be between 0 and 2^64 / classes - n, got ", row_offset);
  return {classes, k, replacement, uint64_t(seed), uint64_t(row_offset)};
}

struct SampleTensors {
  Tensor rows, log_keys, log_threshold;

  Sample data() const {
    return {mutable_data<int64_t>(rows), mutable_data<float>(log_keys),
            mutable_data<float>(log_threshold)};
  }
};

inline std::optional<Tensor> check_row_scale(const char* op, std::optional<Tensor> row_scale,
                                             int64_t n) {
  if (!row_scale) return row_scale;
  STD_TORCH_CHECK(row_scale->scalar_type() == ScalarType::Double && row_scale->dim() == 1 &&
                      row_scale->size(0) == n,
                  op, ": row_scale must be a float64 tensor of length n");
  return as_contiguous(*row_scale);
}

}  // namespace fastif
