// The error that both curvature operators raise.
#pragma once

#include "sampling/curvature_sizes.h"
#include "sampling/sampling_op.h"

namespace fastif {

inline void check_rows(const char* op, const BadRow& bad) {
  if (bad.row < 0) return;
  STD_TORCH_CHECK(!bad.infinite_logit, op, ": logits has +inf in row ", bad.row,
                  "; clamp the logits or repair the model that made them");
  STD_TORCH_CHECK(false, op, ": row_scale (and the size it gives) must be finite and not ",
                  "negative; row ", bad.row, " is not");
}

}  // namespace fastif
