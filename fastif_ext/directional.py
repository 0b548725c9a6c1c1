"""Directional derivatives of every example's loss, without any example's gradient.

For directions x_r in parameter space and examples i: d loss_i / d theta . x_r, all at once. Two
ways give the same numbers. Forward mode takes any network. Layer by layer (layerwise.py) takes
networks whose selected parameters belong to linear and convolution layers, and is several times
faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastif_ext.layerwise import Layers
from fastif_ext.objective import WeightedLoss, differentiable, per_example

FEW = 3  # rows and directions on which both ways are compared
SINGLE = 2  # up to this many directions forward mode is the faster way (bench/bench_scores.py)


def directional_derivatives(
    total: WeightedLoss,
) -> Callable[[Any, Tensor, Sequence[Tensor]], Tensor]:
    """The function (inputs, targets, directions) -> [R, b] for a model and its loss.

    directions are tensors [R, *shape], one for each of total.leaves. The layers' way is taken where
    it agrees with forward mode on a few rows of the data, so that a parameter used outside its
    layer, say, goes the general way.
    """
    layers = Layers.of(total)
    if layers is None:
        return lambda *job: forward_mode(total, *job)
    generator = torch.Generator().manual_seed(0)
    directions = [
        torch.randn(FEW, *leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
        for leaf in total.leaves.values()
    ]
    inputs, targets, _ = next(total.chunks(FEW))
    found = layers.derivatives(inputs, targets, directions)
    wanted = forward_mode(total, inputs, targets, directions)
    tolerance = 1e3 * torch.finfo(total.dtype).eps * float(wanted.abs().max())
    if found is None or not torch.allclose(found, wanted, rtol=1e-3, atol=tolerance):
        return lambda *job: forward_mode(total, *job)

    def by_layers(inputs: Any, targets: Tensor, directions: Sequence[Tensor]) -> Tensor:
        found = None
        if directions[0].shape[0] > SINGLE:
            found = layers.derivatives(inputs, targets, directions)
        return forward_mode(total, inputs, targets, directions) if found is None else found

    return by_layers


def forward_mode(
    total: WeightedLoss, inputs: Any, targets: Tensor, directions: Sequence[Tensor]
) -> Tensor:
    """Directional derivatives [R, b] by forward mode through model and loss."""
    leaves = tuple(leaf.detach() for leaf in total.leaves.values())

    def losses(*values: Tensor) -> Tensor:
        return per_example(total.loss_fn, total.outputs(inputs, values), targets)

    def along(*tangents: Tensor) -> Tensor:
        return torch.func.jvp(losses, leaves, tangents)[1]

    with differentiable(total.model), torch.no_grad():
        return torch.func.vmap(along)(*directions)
