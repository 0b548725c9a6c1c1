"""The operators as documented Python functions: the only place that calls torch.ops.fastif_ext.

One file per family, each function with its meta ("fake") kernel beside it. Importing this package
loads the native module, which registers the operators.
"""

from fastif_ext import _C  # noqa: F401  registers torch.ops.fastif_ext
from fastif_ext.ops.hvp import LissaStep, lissa_update_
from fastif_ext.ops.kmeans import (
    kmeans_assign,
    kmeans_candidates,
    kmeans_nearest,
    kmeans_update,
    kmeans_weighted,
)

__all__ = [
    "LissaStep",
    "kmeans_assign",
    "kmeans_candidates",
    "kmeans_nearest",
    "kmeans_update",
    "kmeans_weighted",
    "lissa_update_",
]
