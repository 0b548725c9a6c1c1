"""Directional derivatives of every example's loss, layer by layer.

A linear layer's output is W a + b, so the derivative of example i's loss along (X, Y) is
delta_i . (X a_i + Y) with delta_i the gradient of its loss in the output: one forward and one
backward pass over the whole batch give every a_i and delta_i. A convolution is a linear layer on
patches, an embedding one on one-hot rows, the scale of a normalization a diagonal one. Of other
parameters the same pass can give each example's gradient. Derivatives are linear in the direction,
so the parts of all parameters add up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from fastif_ext.data import batch_rows
from fastif_ext.example_runs import ByExample
from fastif_ext.layer_runs import Call, Chained, Gradient, Hooked, Places
from fastif_ext.normalized import normalizes
from fastif_ext.objective import WeightedLoss
from fastif_ext.products import Scratch, bias_product, weight_product

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d)


class Layers:
    """The layers of a model that hold selected parameters, and the parameters outside of them."""

    def __init__(self, run: Chained | Hooked | ByExample) -> None:
        self._run, self._scratch = run, Scratch()
        self.numbers_per_row = 0
        """What an example's layers give out, once a pass was made."""
        self.gradient_per_row = 0
        """What an example's gradient in the parameters outside of layers has, likewise."""

    @classmethod
    def of(cls, total: WeightedLoss) -> Layers | None:
        """Of whole batches; None where a selected parameter belongs to no such layer."""
        chained = Chained.of(total)
        if chained is not None:
            return cls(chained)
        layers = _layers(total, ())
        return None if _outside(total, layers) else cls(Hooked(total, layers))

    @classmethod
    def by_example(cls, total: WeightedLoss, apart: Collection[int] = ()) -> Layers:
        """Of examples by themselves; the leaves whose numbers are in `apart` as if outside."""
        layers = _layers(total, apart)
        return cls(ByExample(total, layers, _outside(total, layers)))

    def derivatives(
        self, inputs: Any, targets: Tensor, directions: Sequence[Tensor]
    ) -> Tensor | None:
        """[R, b] for directions [R, *shape] per leaf; None where a layer mixes examples."""
        parts = self.parts(inputs, targets, directions)
        if parts is None:
            return None
        result = directions[0].new_zeros(len(directions[0]), batch_rows(inputs))
        for _, part in parts:
            result += part
        return result

    def parts(
        self, inputs: Any, targets: Tensor, directions: Sequence[Tensor]
    ) -> Iterator[tuple[int, Tensor]] | None:
        """The summands of derivatives, each with the number of its leaf."""
        found = self._run(inputs, targets)
        if found is None:
            return None
        n = max(1, batch_rows(inputs))
        calls = [part for part in found if isinstance(part, Call)]
        gradients = [part for part in found if isinstance(part, Gradient)]
        self.numbers_per_row = sum(call.delta.numel() for call in calls) // n
        self.gradient_per_row = sum(own.rows.numel() for own in gradients) // n
        return self._parts(calls, gradients, directions, n)

    def _parts(
        self, calls: list[Call], gradients: list[Gradient], directions: Sequence[Tensor], n: int
    ) -> Iterator[tuple[int, Tensor]]:
        for module, places, a, delta in calls:
            for name, i in places.items():
                along = directions[i]
                if name == "weight":
                    part = weight_product(module, a, delta, along, self._scratch)
                else:
                    part = bias_product(module, delta, along)
                yield i, part.view(len(along), n, -1).sum(2) if part.shape[1] != n else part
        for i, rows in gradients:
            yield i, _matrix(directions[i]) @ _matrix(rows).T


def _layers(total: WeightedLoss, apart: Collection[int]) -> dict[nn.Module, Places]:
    """The layers that hold leaves other than those `apart`."""
    touched = enumerate(total.selection.touched.values())
    number = {id(p): i for i, p in touched if i not in apart}
    layers: dict[nn.Module, Places] = {}
    for module in filter(_covers, total.model.modules()):
        own = dict(module.named_parameters(recurse=False))
        # of parameters by other names a pruned or reparametrized weight is made
        places = {k: number[id(own[k])] for k in ("weight", "bias") if id(own.get(k)) in number}
        if places:
            layers[module] = places
    return layers


def _outside(total: WeightedLoss, layers: dict[nn.Module, Places]) -> list[int]:
    """The leaves that no layer holds."""
    covered = {i for places in layers.values() for i in places.values()}
    return [i for i in range(len(total.leaves)) if i not in covered]


def _covers(module: nn.Module) -> bool:
    """Whether a module's outputs are linear in its parameters, in a way that products.py knows."""
    if type(module) is nn.Embedding:
        return module.max_norm is None and not module.scale_grad_by_freq
    return type(module) in LINEAR or normalizes(module)


def _matrix(t: Tensor) -> Tensor:
    """[m, *shape] as [m, numbers]."""
    return t.reshape(len(t), t.shape[1:].numel())
