"""Layers whose derivative along directions in their parameters is written out; see layered.py."""

from __future__ import annotations

from torch import nn

from fastif_ext.curvature.layers.convolution import Convolution
from fastif_ext.curvature.layers.layer import (
    PIECEWISE_LINEAR,
    Elementwise,
    Flatten,
    Job,
    Kept,
    Layer,
)
from fastif_ext.curvature.layers.linear import Linear
from fastif_ext.curvature.layers.normalization import BatchNorm
from fastif_ext.curvature.layers.pooling import AveragePool, MaxPool

__all__ = ["IDLE", "KINDS", "PIECEWISE_LINEAR", "SMOOTH", "Job", "Kept", "Layer"]

SMOOTH = (nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.Softplus, nn.Mish)
IDLE = (nn.Identity, nn.Dropout, nn.Dropout2d)  # idle in eval mode
KINDS: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: Linear,
    nn.Conv2d: Convolution,
    nn.BatchNorm1d: BatchNorm,
    nn.BatchNorm2d: BatchNorm,
    nn.MaxPool2d: MaxPool,
    nn.AvgPool2d: AveragePool,
    nn.AdaptiveAvgPool2d: AveragePool,
    nn.Flatten: Flatten,
    **dict.fromkeys((*PIECEWISE_LINEAR, *SMOOTH), Elementwise),
    **dict.fromkeys(IDLE, Layer),
}
"""Of each type of module, but not of its subclasses, the layer."""
