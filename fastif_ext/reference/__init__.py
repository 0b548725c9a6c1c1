"""A pure-PyTorch twin of every operator: the oracle in tests and the baseline in benchmarks.

The twins follow the definitions literally and share no code with the kernels.
"""

from fastif_ext.reference.hvp import lissa_update_
from fastif_ext.reference.kmeans import (
    kmeans_assign,
    kmeans_candidates,
    kmeans_nearest,
    kmeans_update,
    kmeans_weighted,
)

__all__ = [
    "kmeans_assign",
    "kmeans_candidates",
    "kmeans_nearest",
    "kmeans_update",
    "kmeans_weighted",
    "lissa_update_",
]
