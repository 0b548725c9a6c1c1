"""Models that are a chain of layers whose forward pass can be gone through by hand."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from fastif_ext.curvature.layers import KINDS, Layer
from fastif_ext.objective import WeightedLoss


def chain_of(total: WeightedLoss) -> list[Layer] | None:
    """The layers of a model of nested nn.Sequential, from the inputs on; None for other models.

    All selected parameters belong to them, and a call of the model does no more than they do.
    """
    if total.dtype not in (torch.float32, torch.float64):
        return None
    values = total.values()
    names = {id(p): name for name, p in total.model.named_parameters()}
    number = {name: i for i, name in enumerate(total.leaves)}
    layers: list[Layer] = []
    for module in _modules(total.model):
        kind = KINDS.get(type(module))
        if kind is None or not kind.takes(module) or _has_hooks(module):
            return None
        own = {k: names[id(p)] for k, p in module.named_parameters(recurse=False)}
        if not kind.parameters.issuperset(own):
            return None
        places = {k: number[name] for k, name in own.items() if name in number}
        layers.append(kind(module, {k: values[name] for k, name in own.items()}, places))
    covered = {i for layer in layers for i in layer.places.values()}
    return layers if len(covered) == len(number) else None


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of nested nn.Sequential modules."""
    if type(module) is nn.Sequential and not _has_hooks(module):
        for child in module:
            yield from _modules(child)
    else:
        yield module


def _has_hooks(module: nn.Module) -> bool:
    """Whether a call does more than the forward method of the module's class."""
    return "forward" in vars(module) or any(
        getattr(module, name)
        for name in (
            "_forward_pre_hooks",
            "_forward_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    )
