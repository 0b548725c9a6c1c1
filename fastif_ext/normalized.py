"""Layers that normalize what they see and then scale and shift it, entry by entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import batch_norm, group_norm, layer_norm, rms_norm

NORMALIZED: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.BatchNorm1d: lambda m, a: batch_norm(a, m.running_mean, m.running_var, eps=m.eps),
    nn.GroupNorm: lambda m, a: group_norm(a, m.num_groups, eps=m.eps),
    nn.LayerNorm: lambda m, a: layer_norm(a, m.normalized_shape, eps=m.eps),
    nn.RMSNorm: lambda m, a: rms_norm(a, m.normalized_shape, eps=m.eps),
}
NORMALIZED[nn.BatchNorm2d] = NORMALIZED[nn.BatchNorm3d] = NORMALIZED[nn.BatchNorm1d]
"""Of each kind, what is scaled."""


def normalizes(module: nn.Module) -> bool:
    """Whether a module is of these kinds, and no example depends on others of its batch."""
    batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return type(module) in NORMALIZED and not (batch and module.running_mean is None)


def entries(module: nn.Module, t: Tensor) -> Tensor:
    """A tensor of a layer's outputs as [n, places, entries of the scale]."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        behind = len(module.normalized_shape)
        return t.flatten(t.dim() - behind).reshape(len(t), -1, t.shape[-behind:].numel())
    return t.movedim(1, -1).reshape(len(t), -1, t.shape[1])
