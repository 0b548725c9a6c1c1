"""Hessian products of plain layered networks by hand: a few large matrix products, no graph.

For a chain of such layers as in layers/ under cross-entropy, the derivative of the gradient along V
(Pearlmutter 1994) is written out. With a layer's input a, output s = W a, the loss's gradient delta
in s, and R{.} the derivative along V:

    forward    R{s} = V a + W R{a},    R{f(s)} = f'(s) R{s}
    backward   R{delta} = f'(s) R{delta above} + f''(s) delta above R{s}
               R{dW} = R{delta} a^T + delta R{a}^T,    R{delta below} = W^T R{delta} + V^T delta

What does not depend on V is computed once. What does has an axis for the right-hand sides in front
of that of the rows, [R, n, ...].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastif_ext import ops
from fastif_ext.curvature.chain import chain_of
from fastif_ext.curvature.layers import Job, Kept, Layer
from fastif_ext.data import batch_rows
from fastif_ext.objective import Chunk, WeightedLoss, differentiable, is_cross_entropy, per_example

BLOCK = 1 << 22  # numbers of the widest layer that go through together on a CPU, in its cache


class Prepared(NamedTuple):
    """What products need of a chunk of rows."""

    layers: list[Kept]
    probs: Tensor
    weights: Tensor


class LayeredHessian:
    """Hessian products of a chain of layers under cross-entropy.

    Args:
        total: the loss.
        layers: the chain, from the inputs on. The first one of `varied` selected parameters and all
            above it take part in products; those below are constant.
    """

    def __init__(self, total: WeightedLoss, layers: list[Layer]) -> None:
        first = next(i for i, layer in enumerate(layers) if layer.places)
        self._total, self._below, self._layers = total, layers[:first], layers[first:]

    @classmethod
    def of(cls, total: WeightedLoss) -> LayeredHessian | None:
        """The chain, or None where model or loss is of another kind."""
        layers = chain_of(total) if is_cross_entropy(total.loss_fn) else None
        return None if layers is None else cls(total, layers)

    def prepare(self, chunk: Chunk) -> Prepared | None:
        """What products with a chunk's rows need; None where a layer's input is of another kind."""
        x, targets, weights = chunk
        if not isinstance(x, Tensor) or x.dtype != self._total.dtype or targets.dim() > 2:
            return None
        n = batch_rows(x)
        if weights is None:
            weights = x.new_full((n,), 1 / self._total.rows)
        kept = self._keep(
            x, lambda z: (per_example(self._total.loss_fn, z, targets) * weights).sum()
        )
        if kept is None:
            return None
        layers, outputs = kept
        return Prepared(layers, outputs.softmax(1), weights)

    def example_gradients(self, x: Tensor, directions: Tensor) -> list[Tensor]:
        """Each example's gradient of its outputs along its direction, [r, *shape] per leaf."""
        kept = self._keep(x, lambda z: (z * directions).sum())
        assert kept is not None
        result: dict[int, Tensor] = {}
        for layer, of_layer in zip(self._layers, kept[0], strict=True):
            for k, gradient in layer.example_gradients(of_layer).items():
                i = layer.places[k]
                result[i] = result[i] + gradient if i in result else gradient
        return [result[i] for i in range(len(result))]

    def _keep(
        self, x: Tensor, value: Callable[[Tensor], Tensor]
    ) -> tuple[list[Kept], Tensor] | None:
        """What is kept of each layer for the gradient of a value of the outputs, and these."""
        with differentiable(self._total.model), torch.no_grad():
            for layer in self._below:
                x = layer.run(x)
            inputs, outputs = [], []
            with torch.enable_grad():
                for layer in self._layers:
                    if not layer.fits(x):
                        return None
                    inputs.append(x.detach())
                    x = layer.run(x)
                    outputs.append(x)
                if x.dim() != 2:
                    return None
                deltas = torch.autograd.grad(value(x), outputs)
            kept = [
                layer.keep(a, delta)
                for layer, a, delta in zip(self._layers, inputs, deltas, strict=True)
            ]
            return kept, x.detach()

    def multiply(self, prepared: Prepared, directions: list[Tensor]) -> list[Tensor]:
        """The chunk's part of the products with R directions, both [R, *shape] per leaf."""
        rows, together = self._block(prepared, len(directions[0]))
        groups = zip(*(d.split(together) for d in directions), strict=True)
        found = [self._multiply(prepared, list(group), rows) for group in groups]
        if len(found) == 1:
            return found[0]
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _multiply(self, prepared: Prepared, directions: list[Tensor], size: int) -> list[Tensor]:
        """The same, `size` rows at a time with all directions."""
        count, n = len(directions[0]), len(prepared.probs)
        jobs = [
            layer.start({k: directions[i] for k, i in layer.places.items()}, count)
            for layer in self._layers
        ]
        for start in range(0, n, size):
            self._pass(prepared, slice(start, min(n, start + size)), jobs)
        result: list[Tensor | None] = [None] * len(directions)
        for layer, job in zip(self._layers, jobs, strict=True):
            for k, gradient in job.sums.items():
                i = layer.places[k]
                earlier = result[i]  # of another layer with the same parameter
                result[i] = gradient if earlier is None else earlier + gradient
        return [r for r in result if r is not None]

    def _pass(self, prepared: Prepared, part: slice, jobs: list[Job]) -> None:
        """Up and down the layers for some of the rows."""
        along: Tensor | None = None  # R{a}; None for zero
        steps = []
        for layer, kept, job in zip(self._layers, prepared.layers, jobs, strict=True):
            rows = kept.rows(part)
            along, memory = layer.push(job, rows, along)
            steps.append((layer, job, rows, memory))
        assert along is not None
        u = ops.softmax_hvp(prepared.probs[part], along, prepared.weights[part])
        back: Tensor | None = u.to(along.dtype)
        while back is not None and steps:  # the tensors of a layer go when it is done
            layer, job, rows, memory = steps.pop()
            back = layer.pull(job, rows, memory, back)

    def _block(self, prepared: Prepared, count: int) -> tuple[int, int]:
        """How many rows and directions go through together: all rows, if they may, but for one."""
        n = len(prepared.probs)
        if self._total.device.type != "cpu":
            return n, count
        widest = max(t[0].numel() for kept in prepared.layers for t in kept if t is not None)
        rows = min(n, max(1, BLOCK // widest))
        return rows, min(count, max(1, BLOCK // (rows * widest)))
