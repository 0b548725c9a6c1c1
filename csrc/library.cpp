// Every operator's schema, in the order of the README. The contract of each stands in its header.
#include "common/torch_op.h"

STABLE_TORCH_LIBRARY(fastif_ext, m) {
  // k-means
  m.def(
      "kmeans_assign(Tensor x, Tensor centroids, str precision=\"auto\") -> "
      "(Tensor labels, Tensor sqdist)");
  m.def(
      "kmeans_update(Tensor x, Tensor labels, int n_clusters, Tensor? weight=None) -> "
      "(Tensor sums, Tensor counts)");
  m.def("kmeans_nearest(Tensor x, Tensor centroids, int k) -> (Tensor index, Tensor sqdist)");
  m.def("kmeans_weighted(Tensor x, Tensor centroids, int k, int seed) -> Tensor index");
  m.def(
      "kmeans_candidates(Tensor x, Tensor candidates, Tensor sqdist, Tensor? weight=None) -> "
      "(Tensor least, Tensor potential)");
  // curvature products and LiSSA
  m.def(
      "lissa_update_(Tensor(a!) h, Tensor v, Tensor[] hvp, float damping, float scale, "
      "Tensor? mask=None) -> (Tensor delta_sq, Tensor norm_sq, Tensor finite)");
}
