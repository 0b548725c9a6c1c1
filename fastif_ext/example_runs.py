"""What goes into every layer and comes back, with each example by itself: for any parameters.

torch.func.vmap sends all rows through the model at once, each as a batch of its own. So what the
examples of a batch share, such as places that are looked up once, is each example's own here, and a
parameter outside of layers gets a gradient for each example in the same backward pass. A
transformer of two layers takes a tenth longer than by hooks on whole batches. A pass of its own for
the parameters outside would take 0.8 of this one's time (both on one thread of a Xeon).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from fastif_ext.data import cut, tensors_of, tree_map
from fastif_ext.hooks import first_argument, hooked
from fastif_ext.layer_runs import Call, Gradient, Places
from fastif_ext.objective import WeightedLoss, differentiable, per_example

ENTRIES_LAST = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
"""Layers whose outputs may have any number of axes in front; the others have one, of examples."""


class ByExample:
    """Any model that vmap takes, by hooks on its layers."""

    def __init__(
        self, total: WeightedLoss, layers: Mapping[nn.Module, Places], rest: Sequence[int]
    ) -> None:
        self._total, self._layers, self._rest = total, layers, rest
        self._zeros: dict[tuple[torch.Size, ...], list[Tensor]] = {}

    def __call__(self, inputs: Any, targets: Tensor) -> list[Call | Gradient]:
        """The layers' calls, and the gradients in the remaining parameters."""
        leaves = [leaf.detach() for leaf in self._total.leaves.values()]
        modules: list[nn.Module] = []

        def loss(
            rest: list[Tensor], zeros: list[Tensor], parts: list[Tensor], target: Tensor
        ) -> tuple[Tensor, list[Tensor]]:
            values, rows = dict(enumerate(leaves)), iter(parts)
            values.update(zip(self._rest, rest, strict=True))
            seen: list[Tensor] = []

            # the gradient in the zeros that are added is the gradient in the outputs
            def record(module: nn.Module, args: Any, named: Any, output: Tensor) -> Tensor:
                modules.append(module)
                seen.append(first_argument(args, named))
                return output + zeros[len(seen) - 1]

            with hooked(self._layers, record, first=True):
                one = tree_map(lambda _: next(rows)[None], inputs)
                outputs = self._total.outputs(one, list(values.values()))
            return per_example(self._total.loss_fn, outputs, target[None]).sum(), seen

        own = [leaves[i] for i in self._rest]
        with differentiable(self._total.model), torch.no_grad():
            zeros, parts = self._zeros_for(inputs), tensors_of(inputs)
            slopes = vmap(grad(loss, (0, 1), has_aux=True), (None, None, 0, 0))
            (gradients, deltas), seen = slopes(own, zeros, parts, targets)
        calls = [
            Call(m, self._layers[m], _examples_first(m, a), _examples_first(m, delta))
            for m, a, delta in zip(modules, seen, deltas, strict=True)
        ]
        return [*calls, *map(Gradient, self._rest, gradients)]

    def _zeros_for(self, inputs: Any) -> list[Tensor]:
        """A zero like what each call of a layer gives out for one example, of no memory."""
        key = tuple(t.shape[1:] for t in tensors_of(inputs))
        if key not in self._zeros:
            zeros: list[Tensor] = []

            def note(module: nn.Module, args: Any, named: Any, output: Tensor) -> None:
                zeros.append(output.new_zeros(()).expand(output.shape))

            with hooked(self._layers, note, first=True):
                self._total.outputs(cut(inputs, slice(0, 1)))
            self._zeros[key] = zeros
        return self._zeros[key]


def _examples_first(module: nn.Module, t: Tensor) -> Tensor:
    """[n, b, ...] as a layer takes it: a model may make several rows b of an example."""
    return t if isinstance(module, ENTRIES_LAST) else t.flatten(0, 1)
