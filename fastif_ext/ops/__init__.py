"""The operators as documented Python functions: the only place that calls torch.ops.fastif_ext.

One file per family, each function with its meta ("fake") kernel beside it. Importing this package
loads the native module, which registers the operators.
"""

import fastif_ext._C  # noqa: F401  registers torch.ops.fastif_ext
from fastif_ext.ops.hvp import (
    LissaStep,
    hvp_accumulate_,
    linear_softmax_hvp,
    lissa_update_,
    softmax_hvp,
)
from fastif_ext.ops.kmeans import (
    kmeans_assign,
    kmeans_candidates,
    kmeans_nearest,
    kmeans_update,
    kmeans_weighted,
)
from fastif_ext.ops.sample import ClassSample, inclusion_probability, merge_samples
from fastif_ext.ops.sampling import (
    bottom_k,
    class_multinomial,
    curvature_multinomial,
    curvature_sizes,
    multinomial,
)

__all__ = [
    "ClassSample",
    "LissaStep",
    "bottom_k",
    "class_multinomial",
    "curvature_multinomial",
    "curvature_sizes",
    "hvp_accumulate_",
    "inclusion_probability",
    "kmeans_assign",
    "kmeans_candidates",
    "kmeans_nearest",
    "kmeans_update",
    "kmeans_weighted",
    "linear_softmax_hvp",
    "lissa_update_",
    "merge_samples",
    "multinomial",
    "softmax_hvp",
]
