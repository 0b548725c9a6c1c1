"""The Hessian of a model's loss."""

from __future__ import annotations

from torch import Tensor, nn

from fastif_ext.curvature.by_hand import ByHand
from fastif_ext.curvature.layered import LayeredProducts
from fastif_ext.curvature.operator import batched_vjp
from fastif_ext.curvature.outputs import OutputCurvature
from fastif_ext.data import Data
from fastif_ext.objective import Chunk, Loss, is_cross_entropy
from fastif_ext.parameters import Params


class Hessian(ByHand):
    """Hessian of the mean loss (or of ``sum_i w_i loss(z_i)``) over a fixed set of rows.

    A symmetric linear operator: ``H @ v`` by double backward. The gradient's graph is built once
    and reused by every product if it fits into `graph_memory`; otherwise it is rebuilt chunk by
    chunk, in chunks that do fit. For chains of linear, convolution, pooling, batch norm and
    elementwise layers (nested nn.Sequential) under cross-entropy the products are written out
    instead, in less time and memory; that way is taken where it agrees with double backward on a
    few rows.

    Args:
        model: any network; called functionally in eval mode, left as it was.
        loss_fn: loss_fn(outputs, targets) -> mean loss over the examples given to it.
        data: (inputs, targets) tensors, a map-style Dataset or a DataLoader. It is read once, so
            a shuffling loader gives a fixed operator; short batches weigh by their size. Inputs
            may be a tensor, a dict (passed as keyword arguments) or a sequence of tensors.
        weights: one per row, the w_i; by default 1/n each.
        params: None (all trainable), a list of names or fnmatch patterns, a module of the model, or
            a bool mask over all trainable parameters in named_parameters() order.
        chunk_size: rows per chunk; by default as many as fit.
        graph_memory: bytes that kept graphs may take, default 1 GiB.

    Attributes:
        dim: number of selected parameters p. dtype, device: of the parameters.
        rows: number of rows of data. cached: whether the graph is kept between products.
        graph_bytes: memory that the graph of all rows takes, extrapolated from its first rows.
        by_hand: whether the products are written out.

    Raises:
        ValueError: arguments that do not fit, a model or loss whose results are not reproducible.

    Example:
        >>> import torch, fastif_ext as fi
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> H = fi.Hessian(model, torch.nn.functional.mse_loss, (x, torch.zeros(2, 1)))
        >>> H @ torch.tensor([1.0, 1.0])  # (2/n) X^T X v
        tensor([1., 4.])
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        data: Data,
        *,
        weights: Tensor | None = None,
        params: Params = None,
        chunk_size: int | None = None,
        graph_memory: int = 1 << 30,
    ) -> None:
        super().__init__(
            model,
            loss_fn,
            data,
            weights=weights,
            params=params,
            chunk_size=chunk_size,
            graph_memory=graph_memory,
        )

    def _write_out(self) -> LayeredProducts | None:
        loss_fn = self._loss.loss_fn
        if not is_cross_entropy(loss_fn):
            return None
        return LayeredProducts.of(self._loss, OutputCurvature(loss_fn))

    def _graph(self, chunk: Chunk) -> list[Tensor]:
        return self._loss.gradient(chunk, graph=True)

    def _through(self, graph: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
        return batched_vjp(graph, self._leaves, directions)
