"""Curvature of a model's loss on a data set, as a symmetric linear operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fastif_ext.data import BATCH, Data, batch_rows, cut
from fastif_ext.objective import PROBE, Chunk, Loss, WeightedLoss
from fastif_ext.parameters import Params


class Hessian:
    """Hessian of the mean loss (or of ``sum_i w_i loss(z_i)``) over a fixed set of rows.

    A symmetric linear operator: ``H @ v`` by double backward. The gradient's graph is built once
    and reused by every product if it fits into `graph_memory`; otherwise it is rebuilt chunk by
    chunk, in chunks that do fit. All right-hand sides go through in one batch.

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

    Raises:
        ValueError: arguments that do not fit, a model whose outputs are not reproducible.

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
        self._loss = WeightedLoss(
            model, loss_fn, data, weights=weights, params=params, chunk_size=chunk_size
        )
        self.selection = self._loss.selection
        self.dim, self.rows = self.selection.dim, self._loss.rows
        self.dtype, self.device = self._loss.dtype, self._loss.device
        self._leaves = list(self._loss.leaves.values())
        per_row = self._graph_bytes_per_row()
        self.graph_bytes = int(per_row * self.rows)
        self.cached = self.graph_bytes <= graph_memory
        fitting = max(1, int(graph_memory / max(per_row, 1)))
        self._chunk = min(chunk_size or fitting, fitting)
        # a product of R right-hand sides takes about R times the memory of the chunk's graph
        widest = min(self._chunk, BATCH, self.rows) * max(per_row, 1)
        self._together = max(1, int(graph_memory / widest))
        self._graphs: list[list[Tensor]] | None = None

    def __matmul__(self, v: Tensor) -> Tensor:
        """H v for v of shape [p] or [R, p]."""
        self._check(v)
        product = self.selection.join(self._tensors(v if v.dim() == 2 else v[None]))
        return product if v.dim() == 2 else product[0]

    def products(self, v: Tensor) -> list[Tensor]:
        """H v for v [R, p], as autograd returns it: tensors [R, *shape] adding up to p columns.

        What lissa_update_ reads without a flattening copy.
        """
        self._check(v)
        tensors = self._tensors(v)
        return tensors if self.selection.mask is None else [self.selection.join(tensors)]

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """[p] or [R, p] to a tensor per parameter, zero where a mask leaves entries out."""
        batch = v if v.dim() == 2 else v[None]
        parts = self.selection.split(batch)
        names = self.selection.touched
        return {
            name: part if v.dim() == 2 else part[0] for name, part in zip(names, parts, strict=True)
        }

    def _check(self, v: Tensor) -> None:
        if not isinstance(v, Tensor) or v.dim() not in (1, 2) or v.shape[-1] != self.dim:
            got = list(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"H @ v: v must have shape [{self.dim}] or [R, {self.dim}], got {got}")
        if v.dtype != self.dtype or v.device != self.device:
            raise ValueError(
                f"H @ v: v is {v.dtype} on {v.device}, the parameters are {self.dtype} on "
                f"{self.device}; use v.to(H.device, H.dtype)"
            )

    def _tensors(self, v: Tensor) -> list[Tensor]:
        directions = self.selection.split(v.detach())
        if v.shape[0] == 0:
            return directions
        total: list[Tensor] | None = None
        for gradient in self._gradients():
            groups = zip(*(d.split(self._together) for d in directions), strict=True)
            products = [self._differentiate(gradient, group) for group in groups]
            part = [torch.cat(p) if len(p) > 1 else p[0] for p in zip(*products, strict=True)]
            total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
        self._loss.require_connection()
        assert total is not None
        return total

    def _gradients(self) -> Iterator[list[Tensor]]:
        """The gradient of each chunk, with its graph."""
        if self._graphs is not None:
            yield from self._graphs
            return
        graphs = []
        for chunk in self._loss.chunks(self._chunk):
            gradient = self._loss.gradient(chunk, graph=True)
            if self.cached:
                graphs.append(gradient)
            yield gradient
        if self.cached:
            self._graphs = graphs

    def _differentiate(self, gradient: list[Tensor], directions: Sequence[Tensor]) -> list[Tensor]:
        """The gradient's derivative along each of R directions, [R, *shape] per leaf."""
        live = [i for i, g in enumerate(gradient) if g.requires_grad]
        if not live:
            return [torch.zeros_like(d) for d in directions]
        # one backward pass for all R; vmap has a cost of its own, which a single one need not pay
        single = directions[0].shape[0] == 1
        found = torch.autograd.grad(
            [gradient[i] for i in live],
            self._leaves,
            [directions[i][0] if single else directions[i] for i in live],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=not single,
        )
        return [
            torch.zeros_like(d) if f is None else f.detach()[None] if single else f.detach()
            for f, d in zip(found, directions, strict=True)
        ]

    def _graph_bytes_per_row(self) -> float:
        """Bytes that the gradient's graph keeps per row: its growth over the first rows."""
        inputs, targets, weights = next(self._loss.chunks(PROBE))
        n, half = batch_rows(inputs), batch_rows(inputs) // 2
        size = self._graph_bytes((inputs, targets, weights))
        if half == 0:
            return size
        first = None if weights is None else weights[:half]
        smaller = self._graph_bytes((cut(inputs, slice(half)), targets[:half], first))
        return max(0, size - smaller) / (n - half)

    def _graph_bytes(self, chunk: Chunk) -> int:
        """Bytes that a chunk's graph keeps beyond parameters and data."""
        own = {t.untyped_storage().data_ptr() for t in self._loss.held()}
        seen: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return t.detach()  # a reference to t itself would keep the graph alive for ever

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            # held until the count is done, so that no address is used twice
            gradient = self._loss.gradient(chunk, graph=True)
        del gradient
        return sum(seen.values())
