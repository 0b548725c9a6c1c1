"""The Gauss-Newton matrix of a model's loss: curvature without its indefinite part."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastif_ext.curvature.by_hand import ByHand
from fastif_ext.curvature.layered import LayeredProducts
from fastif_ext.curvature.operator import batched_vjp
from fastif_ext.curvature.outputs import OutputCurvature, OutputHessian, Outputs
from fastif_ext.data import Data
from fastif_ext.objective import Chunk, Loss, differentiable
from fastif_ext.parameters import Params


class _Graph(NamedTuple):
    inputs: Any
    outputs: Tensor
    """With the graph that leads back to the parameters."""
    top: Outputs


class GaussNewton(ByHand):
    """The generalised Gauss-Newton matrix ``sum_i w_i J_i^T (d2 loss / d outputs2) J_i``.

    Positive semi-definite for every loss that is convex in the outputs, so that small damping
    suffices, and equal to the Hessian where the model is linear in the selected parameters. A
    product is one forward-mode derivative, the Hessian of the loss in the outputs, and one backward
    pass: no double backward. For the chains of layers for which Hessian's products are written out
    so are these, whatever the loss; where they agree with torch's on a few rows.

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

    Attributes:
        by_hand: whether the products are written out. Others as in Hessian.

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
        self._top = OutputCurvature(loss_fn, output_hessian)
        super().__init__(
            model,
            loss_fn,
            data,
            weights=weights,
            params=params,
            chunk_size=chunk_size,
            graph_memory=graph_memory,
        )

    def _is_softmax(self) -> bool:
        return self._top.is_softmax

    def _write_out(self) -> LayeredProducts | None:
        return LayeredProducts.of(self._loss, self._top, gauss_newton=True)

    def _graph(self, chunk: Chunk) -> _Graph:
        inputs, targets, weights = chunk
        with differentiable(self._loss.model), torch.enable_grad():
            outputs = _tensor(self._loss.outputs(inputs))
        if outputs.requires_grad:
            self._loss.note_connection()
        shares = self._loss.shares(outputs, weights)
        return _Graph(inputs, outputs, self._top.prepare(outputs, targets, shares))

    def _through(self, graph: _Graph, directions: list[Tensor]) -> list[Tensor]:
        z = self._outputs_along(graph.inputs, directions)
        u = self._top.multiply(graph.top, z)
        return batched_vjp([graph.outputs], self._leaves, [u])

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


def _tensor(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"GaussNewton: the model must return a tensor, got a {type(outputs).__name__}; wrap it "
            f"in a module that returns its logits"
        )
    return outputs
