"""Directional derivatives of every example's loss, without any example's gradient.

For directions x_r in parameter space and examples i: d loss_i / d theta . x_r, all at once. Two
ways give the same numbers. Forward mode takes any network. Layer by layer (layerwise.py) takes
networks whose selected parameters belong to linear and convolution layers, and is several times
faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastif_ext.layerwise import Layers
from fastif_ext.objective import WeightedLoss, differentiable, per_example

FEW = 3  # rows and directions on which both ways are compared
IN_FLIGHT = 1 << 22  # numbers that the layers give out at a time
LEAST, MOST = 32, 8192  # rows of a pass
FORWARD = 512  # rows of a pass in forward mode


class DirectionalDerivatives:
    """(inputs, targets, directions) -> [R, b] for a model and its loss.

    directions are tensors [R, *shape], one for each of total.leaves. The layers' way is taken where
    it agrees with forward mode on a few rows of the data, so that a parameter used outside its
    layer, say, goes the general way.
    """

    def __init__(self, total: WeightedLoss) -> None:
        self.total = total
        layers = Layers.of(total)
        self.layers = layers if layers is not None and _agrees(layers, total) else None

    def __call__(self, inputs: Any, targets: Tensor, directions: Sequence[Tensor]) -> Tensor:
        """[R, b], the derivative of each example's loss along each direction."""
        found = None
        if self.layers is not None:
            found = self.layers.derivatives(inputs, targets, directions)
        if found is None:  # another kind of network, or a layer that mixes examples
            found = forward_mode(self.total, inputs, targets, directions)
        return found

    def rows(self) -> int:
        """How many rows a pass best takes: enough to be worth its calls, few enough for memory.

        4,096 rows of an MLP 64-32-10 take 1.7 ms along one direction in one pass, 2.9 in passes of
        1,024; 512 images through a small CNN 52 ms along 8 in one pass, 55 in passes of 256 (one
        thread of a Zen 4 core).
        """
        if self.layers is None:
            return FORWARD
        return max(LEAST, min(MOST, IN_FLIGHT // max(self.layers.numbers_per_row, 1)))


def _agrees(layers: Layers, total: WeightedLoss) -> bool:
    generator = torch.Generator().manual_seed(0)
    directions = [
        torch.randn(FEW, *leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
        for leaf in total.leaves.values()
    ]
    inputs, targets, _ = next(total.chunks(FEW))
    found = layers.derivatives(inputs, targets, directions)
    wanted = forward_mode(total, inputs, targets, directions)
    tolerance = 1e3 * torch.finfo(total.dtype).eps * float(wanted.abs().max())
    return found is not None and torch.allclose(found, wanted, rtol=1e-3, atol=tolerance)


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
