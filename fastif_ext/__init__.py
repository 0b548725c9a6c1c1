"""Faithful and fast influence functions for PyTorch."""

from fastif_ext.build import build_info
from fastif_ext.ops import (
    ClassSample,
    LissaStep,
    bottom_k,
    class_multinomial,
    curvature_multinomial,
    curvature_sizes,
    inclusion_probability,
    lissa_update_,
    merge_samples,
    multinomial,
)
from fastif_ext.weighted_sampler import WeightedRandomSampler

__version__ = str(build_info()["version"])

__all__ = [
    "ClassSample",
    "LissaStep",
    "WeightedRandomSampler",
    "bottom_k",
    "build_info",
    "class_multinomial",
    "curvature_multinomial",
    "curvature_sizes",
    "inclusion_probability",
    "lissa_update_",
    "merge_samples",
    "multinomial",
]
