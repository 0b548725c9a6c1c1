"""A pure-PyTorch twin of every operator: the oracle in tests and the baseline in benchmarks.

The twins follow the definitions literally and share no code with the kernels.
"""

from fastif_ext.reference.hvp import (
    hvp_accumulate_,
    linear_softmax_hvp,
    lissa_update_,
    softmax_hvp,
)
from fastif_ext.reference.kmeans import (
    kmeans_assign,
    kmeans_candidates,
    kmeans_nearest,
    kmeans_update,
    kmeans_weighted,
)
from fastif_ext.reference.sampling import (
    bottom_k,
    class_multinomial,
    curvature_multinomial,
    curvature_sizes,
    merge_samples,
)

__all__ = [
    "bottom_k",
    "class_multinomial",
    "curvature_multinomial",
    "curvature_sizes",
    "hvp_accumulate_",
    "kmeans_assign",
    "kmeans_candidates",
    "kmeans_nearest",
    "kmeans_update",
    "kmeans_weighted",
    "linear_softmax_hvp",
    "lissa_update_",
    "merge_samples",
    "softmax_hvp",
]
