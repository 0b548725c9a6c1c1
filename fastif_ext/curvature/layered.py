"""Products of plain layered networks by hand: a few large matrix products, no graph.

For a chain of such layers as in layers/, the derivative of the gradient along V (Pearlmutter 1994)
is written out. With a layer's input a, output s = W a, the loss's gradient delta in s, and R{.} the
derivative along V:

    forward    R{s} = V a + W R{a},    R{f(s)} = f'(s) R{s}
    top        R{delta} = (d2 loss / d outputs2) R{outputs}
    backward   R{delta} = f'(s) R{delta above} + f''(s) delta above R{s}
               R{dW} = R{delta} a^T + delta R{a}^T,    R{delta below} = W^T R{delta} + V^T delta

The Gauss-Newton matrix is what the Hessian is where every delta is zero: then the terms with delta
are left out, and no delta is computed or kept.

What does not depend on V is computed once. What does has an axis for the right-hand sides in front
of that of the rows, [R, n, ...].
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastif_ext.curvature.chain import chain_of
from fastif_ext.curvature.layers import Job, Kept, Layer
from fastif_ext.curvature.outputs import OutputCurvature, Outputs
from fastif_ext.objective import Chunk, WeightedLoss, differentiable, per_example

BLOCK = 1 << 22  # numbers of the widest layer that go through together on a CPU, in its cache


class Part(NamedTuple):
    """What products need of rows that go through together."""

    layers: list[Kept]
    outputs: Outputs


class Prepared(NamedTuple):
    """What products need of a chunk of rows."""

    parts: list[Part]
    together: int
    """How many directions go through together at the most."""


class LayeredProducts:
    """Products with the Hessian or the Gauss-Newton matrix of a chain of layers.

    Args:
        total: the loss.
        layers: the chain, from the inputs on. The first one of `varied` selected parameters and all
            above it take part in products; those below are constant.
        top: the loss's second derivative in the outputs.
        gauss_newton: which matrix; the Hessian by default.
    """

    def __init__(
        self,
        total: WeightedLoss,
        layers: list[Layer],
        top: OutputCurvature,
        *,
        gauss_newton: bool = False,
    ) -> None:
        first = next(i for i, layer in enumerate(layers) if layer.places)
        self._total, self._below, self._layers = total, layers[:first], layers[first:]
        self._top, self._gauss_newton = top, gauss_newton
        self.keeps_graph = top.by_autograd
        """Whether a graph is kept, that of the loss."""

    @classmethod
    def of(
        cls, total: WeightedLoss, top: OutputCurvature, *, gauss_newton: bool = False
    ) -> LayeredProducts | None:
        """For a model that is a chain; None for others."""
        layers = chain_of(total)
        return None if layers is None else cls(total, layers, top, gauss_newton=gauss_newton)

    def prepare(self, chunk: Chunk) -> Prepared | None:
        """What products with a chunk's rows need; None where a layer's input is of another kind."""
        x, targets, weights = chunk
        if not isinstance(x, Tensor) or x.dtype != self._total.dtype:
            return None
        shares = self._total.shares(x, weights)

        def loss(outputs: Tensor) -> Tensor:
            return (per_example(self._total.loss_fn, outputs, targets) * shares).sum()

        kept = self._keep(x, None if self._gauss_newton else loss)
        if kept is None:
            return None
        layers, outputs, widest = kept
        rows, together = self._block(len(x), widest)
        parts = []
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            top = self._top.prepare(outputs[part], targets[part], shares[part])
            parts.append(Part([of_layer.rows(part) for of_layer in layers], top))
        return Prepared(parts, together)

    def example_gradients(self, x: Tensor, directions: Tensor) -> list[Tensor]:
        """Each example's gradient of its outputs along its direction, [r, *shape] per leaf."""
        kept = self._keep(x, lambda outputs: (outputs * directions).sum())
        assert kept is not None
        result: dict[int, Tensor] = {}
        for layer, of_layer in zip(self._layers, kept[0], strict=True):
            for k, gradient in layer.example_gradients(of_layer).items():
                i = layer.places[k]
                result[i] = result[i] + gradient if i in result else gradient
        return [result[i] for i in range(len(result))]

    def _keep(
        self, x: Tensor, value: Callable[[Tensor], Tensor] | None
    ) -> tuple[list[Kept], Tensor, int] | None:
        """What is kept of each layer, the outputs, and the numbers per row of the widest of all.

        Deltas are those of a value of the outputs; without one there are none.
        """
        with differentiable(self._total.model), torch.no_grad():
            for layer in self._below:
                x = layer.run(x)
            inputs, outputs = [], []
            with torch.set_grad_enabled(value is not None):
                for layer in self._layers:
                    if not layer.fits(x):
                        return None
                    inputs.append(x.detach())
                    x = layer.run(x)
                    outputs.append(x)
                if x.dim() != 2:
                    return None
                deltas: Sequence[Tensor | None] = [None] * len(outputs)
                if value is not None:
                    deltas = torch.autograd.grad(value(x), outputs)
            kept = [
                layer.keep(a, delta)
                for layer, a, delta in zip(self._layers, inputs, deltas, strict=True)
            ]
            return kept, x.detach(), max(t[0].numel() for t in (*inputs, x))

    def multiply(self, prepared: Prepared, directions: list[Tensor]) -> list[Tensor]:
        """The chunk's part of the products with R directions, both [R, *shape] per leaf."""
        together = min(prepared.together, len(directions[0]))
        groups = zip(*(d.split(together) for d in directions), strict=True)
        found = [self._multiply(prepared.parts, list(group)) for group in groups]
        if len(found) == 1:
            return found[0]
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _multiply(self, parts: list[Part], directions: list[Tensor]) -> list[Tensor]:
        """The same for directions that go through together."""
        jobs = [
            layer.start({k: directions[i] for k, i in layer.places.items()}, len(directions[0]))
            for layer in self._layers
        ]
        for part in parts:
            self._pass(part, jobs)
        result: list[Tensor | None] = [None] * len(directions)
        for layer, job in zip(self._layers, jobs, strict=True):
            for k, gradient in job.sums.items():
                i = layer.places[k]
                earlier = result[i]  # of another layer with the same parameter
                result[i] = gradient if earlier is None else earlier + gradient
        return [r for r in result if r is not None]

    def _pass(self, part: Part, jobs: list[Job]) -> None:
        """Up and down the layers for some of the rows."""
        along: Tensor | None = None  # R{a}; None for zero
        steps = []
        for layer, kept, job in zip(self._layers, part.layers, jobs, strict=True):
            along, memory = layer.push(job, kept, along)
            steps.append((layer, job, kept, memory))
        assert along is not None
        back = self._top.multiply(part.outputs, along)
        while steps:  # the tensors of a layer go when it is done
            layer, job, kept, memory = steps.pop()
            layer.gather(job, kept, memory, back)
            if steps:
                back = layer.pull(job, kept, memory, back)

    def _block(self, n: int, widest: int) -> tuple[int, int]:
        """How many rows and directions go through together: all rows, if they may, but for one."""
        if self._total.device.type != "cpu":
            return n, sys.maxsize
        rows = min(n, max(1, BLOCK // widest))
        return rows, max(1, BLOCK // (rows * widest))
