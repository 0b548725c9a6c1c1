// The argument `hvp: Tensor[]` of the operators: products in the parameters' own shapes.
#pragma once

#include <vector>

#include "common/torch_op.h"

namespace fastif {

struct ParameterList {
  std::vector<Tensor> tensors;   // contiguous, [R, *shape]
  std::vector<int64_t> lengths;  // elements of each per right-hand side

  ParameterList(const char* op, const std::vector<Tensor>& hvp, int64_t R, int64_t p) {
    STD_TORCH_CHECK(!hvp.empty(), op, ": hvp is an empty list");
    int64_t total = 0;
    for (const auto& product : hvp) {
      STD_TORCH_CHECK(product.dim() >= 1 && product.size(0) == R, op,
                      ": every tensor of hvp must be [R, *parameter shape]");
      STD_TORCH_CHECK(product.scalar_type() == hvp[0].scalar_type(), op,
                      ": the tensors of hvp must have one dtype");
      int64_t length = 1;
      for (int64_t d = 1; d < product.dim(); ++d) length *= product.size(d);
      lengths.push_back(length);
      total += length;
      tensors.push_back(as_contiguous(product));
    }
    STD_TORCH_CHECK(total == p, op, ": hvp has ", total, " elements per right-hand side, not ", p);
  }

  template <class G>
  std::vector<const G*> pointers() const {
    std::vector<const G*> result;
    for (const auto& product : tensors) result.push_back(data<G>(product));
    return result;
  }
};

// Calls body(T{}, G{}) with the element types of the state and of the products.
template <class Body>
void dispatch_state(const char* op, ScalarType state, ScalarType product, Body&& body) {
  if (state == ScalarType::Double && product == ScalarType::Double) {
    body(double{}, double{});
  } else if (state == ScalarType::Float && product == ScalarType::Float) {
    body(float{}, float{});
  } else if (state == ScalarType::Float && product == ScalarType::Half) {
    body(float{}, Half{});
  } else if (state == ScalarType::Float && product == ScalarType::BFloat16) {
    body(float{}, BFloat16{});
  } else {
    STD_TORCH_CHECK(false, op,
                    ": the state must be float32 or float64, and hvp of the same dtype, or "
                    "float16/bfloat16 with a float32 state");
  }
}

}  // namespace fastif
