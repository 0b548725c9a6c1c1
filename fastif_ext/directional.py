"""Directional derivatives of every example's loss.

For directions x_r in parameter space and examples i: d loss_i / d theta . x_r, all at once. Three
ways give the same numbers; the first that does so on a few rows is taken. Layer by layer, for whole
batches (layerwise.py): all selected parameters belong to linear, convolution, embedding and norm
layers. Layer by layer with each example by itself, and with the gradients in parameters outside of
such layers: what torch.func.vmap takes. Forward mode: any network, several times slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastif_ext.layerwise import Layers
from fastif_ext.objective import WeightedLoss, differentiable, per_example

TRIES = 16  # groups of so many rows that are looked at for derivatives that are not zero
FEW = 3  # rows and directions on which the ways are compared
IN_FLIGHT = 1 << 22  # numbers that the layers give out at a time
GRADIENTS = 1 << 26  # numbers in the gradients that are formed at a time, of parameters elsewhere
LEAST, MOST = 32, 8192  # rows of a pass
UNSEEN = 512  # most rows of a pass where what is kept for a row is not known


class DirectionalDerivatives:
    """(inputs, targets, directions) -> [R, b] for a model and its loss.

    directions are tensors [R, *shape], one for each of total.leaves.
    """

    def __init__(self, total: WeightedLoss) -> None:
        self.total = total
        self.layers = _Trial(total).best()

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
            return UNSEEN
        rows = max(LEAST, min(MOST, IN_FLIGHT // max(self.layers.numbers_per_row, 1)))
        own = self.layers.gradient_per_row
        return max(1, min(rows, UNSEEN, GRADIENTS // own)) if own else rows


class _Trial:
    """A few rows and directions, and what forward mode finds there."""

    def __init__(self, total: WeightedLoss) -> None:
        generator = torch.Generator().manual_seed(0)
        self._total = total
        self._directions = [
            torch.randn(FEW, *leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
            for leaf in total.leaves.values()
        ]
        self._inputs, self._targets, self._wanted = self._rows()

    def _rows(self) -> tuple[Any, Tensor, Tensor]:
        """Rows with derivatives that are not zero, if the first ones have any, and these."""
        best: tuple[Any, Tensor, Tensor] | None = None
        for inputs, targets, _ in islice(self._total.chunks(FEW), TRIES):
            wanted = forward_mode(self._total, inputs, targets, self._directions)
            if best is None or wanted.count_nonzero() > best[2].count_nonzero():
                best = inputs, targets, wanted
            if wanted.all():
                break
        assert best is not None
        return best

    def best(self) -> Layers | None:
        """The fastest way that agrees with forward mode; None where that alone is left.

        A parameter that is used outside of its layer, too, is taken for one outside of layers.
        """
        together = Layers.of(self._total)
        if together is not None and self._agrees(together):
            return together
        try:
            alone = Layers.by_example(self._total)
            if self._agrees(alone):
                return alone
            alone = Layers.by_example(self._total, self._elsewhere(alone))
            return alone if self._agrees(alone) else None
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError):  # not for vmap: it asks for values, or needs a batch
            return None

    def _agrees(self, layers: Layers) -> bool:
        found = layers.derivatives(self._inputs, self._targets, self._directions)
        return found is not None and self._close(found, self._wanted)

    def _elsewhere(self, layers: Layers) -> set[int]:
        """The leaves whose gradients are not what their layers see."""
        everything = range(len(self._directions))
        seen = self._by_leaf(layers)
        true = self._by_leaf(Layers.by_example(self._total, everything))
        return {i for i in everything if not self._close(seen[i], true[i])}

    def _by_leaf(self, layers: Layers) -> Tensor:
        """[leaves, R, b], the parts of the derivatives."""
        result = self._wanted.new_zeros(len(self._directions), *self._wanted.shape)
        for i, part in layers.parts(self._inputs, self._targets, self._directions) or ():
            result[i] += part
        return result

    def _close(self, found: Tensor, wanted: Tensor) -> bool:
        tolerance = 1e3 * torch.finfo(found.dtype).eps * float(self._wanted.abs().max())
        return torch.allclose(found, wanted, rtol=1e-3, atol=tolerance)


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
