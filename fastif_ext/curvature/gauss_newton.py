"""The Gauss-Newton matrix of a model's loss: curvature without its indefinite part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastif_ext import ops
from fastif_ext.curvature.operator import CurvatureOperator, batched_vjp
from fastif_ext.data import Data
from fastif_ext.objective import Chunk, Loss, differentiable, is_cross_entropy, per_example
from fastif_ext.parameters import Params

OutputHessian = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Prepared(NamedTuple):
    inputs: Any
    targets: Tensor
    weights: Tensor
    """One per row."""
    outputs: Tensor
    """With the graph that leads back to the parameters."""
    probs: Tensor | None
    """Their softmax, for cross-entropy."""


class GaussNewton(CurvatureOperator):
    """The generalised Gauss-Newton matrix ``sum_i w_i J_i^T (d2 loss / d outputs2) J_i``.

    Positive semi-definite for every loss that is convex in the outputs, so that small damping
    suffices, and equal to the Hessian where the model is linear in the selected parameters. A
    product is one forward-mode derivative, the Hessian of the loss in the outputs, and one backward
    pass: no double backward.

    Args:
        model: any network whose outputs are a tensor; as in Hessian, and so are all that are not
            explained here.
        data: (inputs, targets), a map-style Dataset or a DataLoader.
        loss_fn: loss_fn(outputs, targets) -> mean loss. Cross-entropy on logits [b, Y] has a kernel
            of its own; other losses go through autograd.
        output_hessian: output_hessian(outputs [b, ...], targets, z [R, b, ...]) -> [R, b, ...], the
            product of each example's own d2 loss / d outputs2 with z; in place of autograd, or to
            put another matrix there. loss_fn is then not differentiated.
        weights: one per row, the w_i; by default 1/n each.
        params: the selected parameters.
        chunk_size: rows per chunk.
        graph_memory: bytes that kept graphs may take.

    Raises:
        ValueError: arguments that do not fit; outputs that are no tensor.

    Example:
        >>> import torch, fastif_ext as fi
        >>> model, x = torch.nn.Linear(2, 2), torch.randn(20, 2)
        >>> data = (x, torch.arange(20) % 2)
        >>> G, H = fi.GaussNewton(model, data), fi.Hessian(model, torch.nn.CrossEntropyLoss(), data)
        >>> torch.allclose(G @ torch.ones(6), H @ torch.ones(6), atol=1e-6)  # linear: the same
        True
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        *,
        loss_fn: Loss = cross_entropy,
        output_hessian: OutputHessian | None = None,
        weights: Tensor | None = None,
        params: Params = None,
        chunk_size: int | None = None,
        graph_memory: int = 1 << 30,
    ) -> None:
        self._output_hessian = output_hessian
        self._softmax = output_hessian is None and is_cross_entropy(loss_fn)
        super().__init__(
            model,
            loss_fn,
            data,
            weights=weights,
            params=params,
            chunk_size=chunk_size,
            graph_memory=graph_memory,
        )

    def _prepare(self, chunk: Chunk) -> _Prepared:
        inputs, targets, weights = chunk
        with differentiable(self._loss.model), torch.enable_grad():
            outputs = _tensor(self._loss.outputs(inputs))
        if outputs.requires_grad:
            self._loss.note_connection()
        if weights is None:
            weights = outputs.new_full((len(outputs),), 1 / self.rows)
        softmax = self._softmax and outputs.dim() == 2
        probs = outputs.detach().softmax(1) if softmax else None
        return _Prepared(inputs, targets, weights.to(outputs.dtype), outputs, probs)

    def _is_softmax(self) -> bool:
        return self._softmax

    def _multiply(self, prepared: _Prepared, directions: list[Tensor]) -> list[Tensor]:
        z = self._outputs_along(prepared.inputs, directions)
        if prepared.probs is not None:
            u = ops.softmax_hvp(prepared.probs, z, prepared.weights).to(z.dtype)
        else:
            outputs, targets = prepared.outputs.detach(), prepared.targets
            if self._output_hessian is not None:
                u = self._output_hessian(outputs, targets, z)
            else:
                u = self._loss_curvature(outputs, targets, z)
            if u.shape != z.shape:
                raise ValueError(
                    f"output_hessian must return a tensor of z's shape {list(z.shape)}, got "
                    f"{list(u.shape)}"
                )
            u = u * prepared.weights.view(-1, *[1] * (outputs.dim() - 1))
        return batched_vjp([prepared.outputs], self._leaves, [u])

    def _outputs_along(self, inputs: Any, directions: list[Tensor]) -> Tensor:
        """Directional derivatives of the outputs, [R, b, ...], by forward mode."""
        leaves = [leaf.detach() for leaf in self._leaves]

        def outputs(*values: Tensor) -> Tensor:
            return _tensor(self._loss.outputs(inputs, values))

        def along(*tangents: Tensor) -> Tensor:
            return torch.func.jvp(outputs, tuple(leaves), tangents)[1]

        with differentiable(self._loss.model), torch.no_grad():
            if directions[0].shape[0] == 1:  # vmap has a cost of its own
                return along(*(d[0] for d in directions))[None]
            return torch.func.vmap(along)(*directions)

    def _loss_curvature(self, outputs: Tensor, targets: Tensor, z: Tensor) -> Tensor:
        """Each example's d2 loss / d outputs2 times z, by autograd through the loss alone."""
        with torch.enable_grad():
            at = outputs.requires_grad_()
            losses = per_example(self._loss.loss_fn, at, targets)
            (slope,) = torch.autograd.grad(losses.sum(), at, create_graph=True)
        return batched_vjp([slope], [at], [z])[0]


def _tensor(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"GaussNewton: the model must return a tensor, got a {type(outputs).__name__}; wrap it "
            f"in a module that returns its logits"
        )
    return outputs
