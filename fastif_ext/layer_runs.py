"""What goes into every layer, and the loss's gradient in what comes out, for whole batches.

Two ways: any model is run with hooks, a chain of plain layers layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fastif_ext.curvature.chain import chain_of
from fastif_ext.curvature.layers import Layer
from fastif_ext.data import batch_rows
from fastif_ext.device import full_precision
from fastif_ext.hooks import first_argument, hooked
from fastif_ext.objective import WeightedLoss, differentiable, is_cross_entropy, per_example

Places = Mapping[str, int]
"""The numbers of a layer's parameters "weight" and "bias" among the leaves, where selected."""


class Call(NamedTuple):
    """One call of a layer: its inputs, and the gradient of the examples' losses in its outputs."""

    module: nn.Module
    places: Places
    inputs: Tensor
    delta: Tensor


class Gradient(NamedTuple):
    """A parameter outside of layers: its number among the leaves, each example's gradient in it."""

    place: int
    rows: Tensor


class Hooked:
    """Any model, by hooks on its layers.

    Images go in in channels_last, which residual networks pass on, and take a fifth less time. A
    model that looks at them through `view` may demand the usual order; it gets that.
    """

    def __init__(self, total: WeightedLoss, layers: Mapping[nn.Module, Places]) -> None:
        self._total, self._layers = total, layers
        self._channels_last = True

    def __call__(self, inputs: Any, targets: Tensor) -> list[Call] | None:
        """The calls, those left out that the loss does not depend on; None where one mixes rows."""
        calls = self._in_order(inputs, targets)
        n = batch_rows(inputs)
        return calls if all(len(c.inputs) == n == len(c.delta) for c in calls) else None

    def _in_order(self, inputs: Any, targets: Tensor) -> list[Call]:
        if self._channels_last and isinstance(inputs, Tensor) and inputs.dim() == 4:
            try:
                return self._run(_channels_last(inputs), targets)
            except RuntimeError:  # if it is about anything else, it comes again below
                self._channels_last = False
        return self._run(inputs, targets)

    def _run(self, inputs: Any, targets: Tensor) -> list[Call]:
        n = batch_rows(inputs)
        seen: list[tuple[nn.Module, Tensor, GradientEdge]] = []

        def record(module: nn.Module, args: Any, named: Any, output: Tensor) -> Tensor:
            if output.requires_grad:
                a = first_argument(args, named)
                table = isinstance(module, nn.Embedding)
                if table and a.dim() > 1 and len(a) == 1:  # places, the same for all examples
                    a, output = a.expand(n, *a.shape[1:]), output.expand(n, *output.shape[1:])
                # the edge stays that of this output, even if it is overwritten in place afterwards
                seen.append((module, a.detach(), get_gradient_edge(output)))
            return output

        model = self._total.model
        with hooked(self._layers, record), differentiable(model), torch.enable_grad():
            outputs = self._total.outputs(inputs)
        top, slope = _top(self._total, outputs, targets)
        if not seen or not top.requires_grad:
            return []
        deltas = torch.autograd.grad(top, [edge for *_, edge in seen], slope, allow_unused=True)
        return [
            Call(module, self._layers[module], a, delta)
            for (module, a, _), delta in zip(seen, deltas, strict=True)
            if delta is not None
        ]


class Chained:
    """A chain of plain layers, with images in channels_last between them on a CPU.

    There a convolution 16 -> 32 goes back in 4.5 ms for 512 images of 14 x 14, in 12 otherwise, and
    patches are gathered in whole runs of channels.
    """

    def __init__(self, total: WeightedLoss, layers: list[Layer]) -> None:
        self._first = next(i for i, layer in enumerate(layers) if layer.places)
        for layer in layers:
            layer.values = {k: _channels_last(t.detach()) for k, t in layer.values.items()}
        self._total, self._layers = total, layers

    @classmethod
    def of(cls, total: WeightedLoss) -> Chained | None:
        """The chain, where the model is one."""
        layers = chain_of(total)
        return None if layers is None else cls(total, layers)

    def __call__(self, inputs: Any, targets: Tensor) -> list[Call] | None:
        """The calls; None where a layer's input is of another kind."""
        x = inputs
        if not isinstance(x, Tensor) or x.dtype != self._total.dtype:
            return None
        steps: list[tuple[Layer, Tensor, Tensor]] = []
        calls: list[Call] = []
        # plain layers do in train mode what they do in eval mode, so no module's mode is set
        with full_precision(self._total.device), torch.enable_grad():
            for i, layer in enumerate(self._layers):
                if not layer.fits(x):
                    return None
                a = _channels_last(x.detach()).requires_grad_(i > self._first)
                x = layer.run(a)
                steps.append((layer, a, x))
            x = x.detach().requires_grad_()
            top, slope = _top(self._total, x, targets)
            if not top.requires_grad:
                return []
            (delta,) = torch.autograd.grad(top, x, slope)
            for layer, a, output in reversed(steps[self._first :]):
                delta = _channels_last(delta)
                if layer.places:
                    calls.append(Call(layer.module, layer.places, a.detach(), delta))
                if a.requires_grad:
                    (delta,) = torch.autograd.grad(output, a, delta)
        return calls


def _top(total: WeightedLoss, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where to go back from, and the gradient of the examples' losses there.

    For cross-entropy over classes these are the outputs and softmax - one-hot, with the rows in the
    last axis: 0.1 ms for 4,096 rows and 10 classes, 1.0 by autograd.
    """
    plain = is_cross_entropy(total.loss_fn) and not getattr(total.loss_fn, "label_smoothing", 0)
    if plain and isinstance(outputs, Tensor) and outputs.dim() == 2 and targets.dim() == 1:
        slope = outputs.detach().T.contiguous().softmax(0)
        counts = targets != getattr(total.loss_fn, "ignore_index", -100)
        own = targets.long().mul(counts)[None]
        slope.scatter_add_(0, own, slope.new_full(own.shape, -1)).mul_(counts)
        return outputs, slope.T
    with torch.enable_grad():
        return per_example(total.loss_fn, outputs, targets).sum(), None


def _channels_last(t: Tensor) -> Tensor:
    """Images in channels_last on a CPU, by their strides even where there is one channel."""
    if t.dim() != 4 or t.device.type != "cpu":
        return t
    if t.stride(1) == 1 and t.is_contiguous(memory_format=torch.channels_last):
        return t
    return torch.empty_like(t, memory_format=torch.channels_last).copy_(t)
