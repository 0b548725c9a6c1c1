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

  // sampling
  m.def(
      "class_multinomial(Tensor logits, int k, bool replacement, int seed, int row_offset=0) "
      "-> (Tensor rows, Tensor log_keys, Tensor log_threshold, Tensor skipped)");
  m.def(
      "bottom_k(Tensor weights, int k, bool replacement, int seed, int row_offset=0, "
      "bool require_k=False) -> (Tensor rows, Tensor log_keys, Tensor log_threshold)");
  m.def("curvature_sizes(Tensor logits, Tensor? row_scale=None) -> Tensor");
  m.def(
      "curvature_multinomial(Tensor logits, int m, int seed, int row_offset=0, "
      "Tensor? row_scale=None, float floor=0.0) "
      "-> (Tensor rows, Tensor log_keys, Tensor log_threshold, Tensor skipped)");
  m.def(
      "merge_samples(Tensor rows_a, Tensor log_keys_a, Tensor log_threshold_a, Tensor rows_b, "
      "Tensor log_keys_b, Tensor log_threshold_b) "
      "-> (Tensor rows, Tensor log_keys, Tensor log_threshold)");
  // curvature products and LiSSA
  m.def("softmax_hvp(Tensor probs, Tensor z, Tensor? weight=None) -> Tensor");
  m.def("linear_softmax_hvp(Tensor x, Tensor probs, Tensor v, Tensor? weight=None) -> Tensor");
  m.def("hvp_accumulate_(Tensor(a!) acc, Tensor[] hvp, float weight) -> ()");
  m.def(
      "lissa_update_(Tensor(a!) h, Tensor v, Tensor[] hvp, float damping, float scale, "
      "Tensor? mask=None) -> (Tensor delta_sq, Tensor norm_sq, Tensor finite)");
}
