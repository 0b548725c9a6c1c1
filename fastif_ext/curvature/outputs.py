"""The loss's second derivative in the outputs: what stands in the middle of a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastif_ext import ops
from fastif_ext.curvature.operator import batched_vjp
from fastif_ext.objective import Loss, is_cross_entropy, per_example, target_mass

OutputHessian = Callable[[Tensor, Tensor, Tensor], Tensor]


class Outputs(NamedTuple):
    """What the second derivative depends on, for n rows."""

    at: Tensor
    """The outputs [n, ...]; for cross-entropy over classes their softmax [n, C]."""
    targets: Tensor
    weights: Tensor
    """[n]"""
    slope: Tensor | None = None
    """The losses' gradient in the outputs, with its graph, where autograd goes on from there."""


class OutputCurvature:
    """Each row's d2 loss / d outputs2 times its weight.

    Args:
        loss_fn: loss_fn(outputs, targets) -> mean loss. Cross-entropy on logits [n, C] has a kernel
            of its own; other losses go through autograd.
        own: output_hessian of GaussNewton, in place of the loss's.
    """

    def __init__(self, loss_fn: Loss, own: OutputHessian | None = None) -> None:
        self._loss_fn, self._own = loss_fn, own
        self.is_softmax = own is None and is_cross_entropy(loss_fn)
        self.by_autograd = own is None and not self.is_softmax

    def prepare(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> Outputs:
        """What products need, from the rows' outputs."""
        at = outputs.detach()
        if self._over_classes(at):
            mass = target_mass(self._loss_fn, targets)
            return Outputs(at.softmax(1), targets, weights * mass.to(weights))
        if self._own is not None:
            return Outputs(at, targets, weights)
        with torch.enable_grad():
            losses = per_example(self._loss_fn, at.requires_grad_(), targets)
            (slope,) = torch.autograd.grad(losses.sum(), at, create_graph=True)
        return Outputs(at, targets, weights, slope)

    def multiply(self, outputs: Outputs, z: Tensor) -> Tensor:
        """The products with R directions in the outputs, both [R, n, ...]."""
        at, targets, weights, slope = outputs
        if self._over_classes(at):
            return ops.softmax_hvp(at, z, weights).to(z.dtype)
        if self._own is None:
            assert slope is not None
            (u,) = batched_vjp([slope], [at], [z])
        else:
            u = self._own(at, targets, z)
            if u.shape != z.shape:
                raise ValueError(
                    f"output_hessian must return a tensor of z's shape {list(z.shape)}, got "
                    f"{list(u.shape)}"
                )
        return u * weights.view(-1, *[1] * (at.dim() - 1))

    def _over_classes(self, outputs: Tensor) -> bool:
        return self.is_softmax and outputs.dim() == 2
