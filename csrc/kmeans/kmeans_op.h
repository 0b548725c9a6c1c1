// What the k-means operators share. Only *_op.cpp files include this.
#pragma once

#include <utility>

#include "common/torch_op.h"

namespace fastif {

// The type in which distances and sums for x are computed and returned.
inline ScalarType accumulate_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Checks x and centroids, and runs kmeans_assign: (labels, sqdist).
std::pair<Tensor, Tensor> checked_assign(const char* op, const Tensor& x, const Tensor& centroids,
                                         bool exact = true);

}  // namespace fastif
