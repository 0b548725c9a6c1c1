"""Faithful and fast influence functions for PyTorch."""

from fastif_ext.build import build_info
from fastif_ext.kmeans import KMeans
from fastif_ext.ops import (
    LissaStep,
    kmeans_assign,
    kmeans_nearest,
    kmeans_update,
    kmeans_weighted,
    lissa_update_,
)

__version__ = str(build_info()["version"])

__all__ = [
    "KMeans",
    "LissaStep",
    "build_info",
    "kmeans_assign",
    "kmeans_nearest",
    "kmeans_update",
    "kmeans_weighted",
    "lissa_update_",
]
