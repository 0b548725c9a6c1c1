"""Directional derivatives of every example's loss, layer by layer.

A linear layer's output is W a + b, so the derivative of example i's loss along (X, Y) is
delta_i . (X a_i + Y) with delta_i the gradient of its loss in the output: one forward and one
backward pass over the whole batch give every a_i and delta_i. A convolution is a linear layer on
patches, an embedding one on one-hot rows, the scale of a normalization a diagonal one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastif_ext.data import batch_rows
from fastif_ext.layer_runs import Chained, Hooked, Places
from fastif_ext.normalized import normalizes
from fastif_ext.objective import WeightedLoss
from fastif_ext.products import Scratch, bias_product, weight_product


class Layers:
    """The layers of such kinds that hold all selected parameters of a model."""

    def __init__(self, run: Chained | Hooked) -> None:
        self._run, self._scratch = run, Scratch()
        self.numbers_per_row = 0
        """What an example's layers give out, once a pass was made."""

    @classmethod
    def of(cls, total: WeightedLoss) -> Layers | None:
        """The layers, or None where a selected parameter belongs to no such layer."""
        chained = Chained.of(total)
        if chained is not None:
            return cls(chained)
        number = {id(p): i for i, p in enumerate(total.selection.touched.values())}
        layers: dict[nn.Module, Places] = {}
        for module in total.model.modules():
            if _covers(module):
                own = module.named_parameters(recurse=False)
                places = {name: number[id(p)] for name, p in own if id(p) in number}
                if places:
                    layers[module] = places
        covered = {i for places in layers.values() for i in places.values()}
        return cls(Hooked(total, layers)) if len(covered) == len(number) else None

    def derivatives(
        self, inputs: Any, targets: Tensor, directions: Sequence[Tensor]
    ) -> Tensor | None:
        """[R, b] for directions [R, *shape] per leaf; None where a layer mixes examples."""
        n = batch_rows(inputs)
        calls = self._run(inputs, targets)
        if calls is None or any(len(t) != n for call in calls for t in (call.inputs, call.delta)):
            return None
        self.numbers_per_row = sum(call.delta.numel() for call in calls) // max(1, n)
        result = directions[0].new_zeros(len(directions[0]), n)
        for call in calls:
            along = {name: directions[i] for name, i in call.places.items()}
            if "weight" in along:
                result += weight_product(
                    call.module, call.inputs, call.delta, along["weight"], self._scratch
                )
            if "bias" in along:
                result += bias_product(call.module, call.delta, along["bias"])
        return result


def _covers(module: nn.Module) -> bool:
    """Whether a module's outputs are linear in its parameters, in a way that products.py knows."""
    if type(module) is nn.Embedding:
        return module.max_norm is None and not module.scale_grad_by_freq
    return type(module) in (nn.Linear, nn.Conv2d) or normalizes(module)
