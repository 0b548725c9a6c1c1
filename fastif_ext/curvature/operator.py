"""What the curvature operators share: products with vectors, chunk by chunk, graphs kept or not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fastif_ext.curvature.factor import output_directions, preconditioner_of, rows_worth_taking
from fastif_ext.data import BATCH, Data, batch_rows, cut, tensors_of
from fastif_ext.device import full_precision, kept_rng, memory_for
from fastif_ext.objective import (
    PROBE,
    Chunk,
    Loss,
    WeightedLoss,
    differentiable,
    is_cross_entropy,
    target_mass,
)
from fastif_ext.parameters import Params
from fastif_ext.preconditioner import LowRankPreconditioner

FEW = 4  # rows on which a product is made twice, to see that it comes out the same
FACTOR_ROWS = 32  # gradients of examples that are held besides those that are done


class CurvatureOperator(ABC):
    """A symmetric linear operator ``sum_i w_i C_i`` over the rows i of a data set.

    A subclass says what is made once for a chunk of rows (`_prepare`: a graph) and how directions
    are multiplied with it (`_multiply`). The graphs are kept between products if they fit into
    `graph_memory`; otherwise they are rebuilt chunk by chunk, in chunks that do fit. All right-hand
    sides go through in one batch.
    """

    _batches = True  # whether several directions go through at a time

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        data: Data,
        *,
        weights: Tensor | None,
        params: Params,
        chunk_size: int | None,
        graph_memory: int,
    ) -> None:
        self._loss = WeightedLoss(
            model, loss_fn, data, weights=weights, params=params, chunk_size=chunk_size
        )
        self.selection = self._loss.selection
        self.dim, self.rows = self.selection.dim, self._loss.rows
        self.dtype, self.device = self._loss.dtype, self._loss.device
        self._leaves = list(self._loss.leaves.values())
        self._try_product()
        per_row = self._graph_bytes_per_row()
        self.graph_bytes = int(per_row * self.rows)
        self.cached = self.graph_bytes <= graph_memory
        fitting = max(1, int(graph_memory / max(per_row, 1)))
        self._chunk = min(chunk_size or fitting, fitting)
        # a product of R right-hand sides takes about R times the memory of the chunk's graph
        widest = min(self._chunk, BATCH, self.rows) * max(per_row, 1)
        self._together = max(1, int(graph_memory / widest)) if self._batches else 1
        self._kept: list[Any] | None = None
        self.recordable = self.cached  # see fastif_ext.graphs

    def renew(self) -> None:
        """Drop the kept graphs; the next product makes them again, on its own stream."""
        self._kept = None

    @abstractmethod
    def _prepare(self, chunk: Chunk) -> Any:
        """What products with a chunk's rows need: the graph of its gradient or outputs."""

    @abstractmethod
    def _multiply(self, prepared: Any, directions: list[Tensor]) -> list[Tensor]:
        """The chunk's part of the products with R directions, both [R, *shape] per leaf."""

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with v of shape [p] or [R, p]."""
        self._check(v)
        product = self.selection.join(self._tensors(v if v.dim() == 2 else v[None]))
        return product if v.dim() == 2 else product[0]

    def products(self, v: Tensor) -> list[Tensor]:
        """The product with v [R, p], as autograd returns it: tensors [R, *shape], p columns in all.

        What lissa_update_ reads without a flattening copy.
        """
        self._check(v)
        tensors = self._tensors(v)
        return tensors if self.selection.mask is None else [self.selection.join(tensors)]

    def preconditioner(self, damping: float, right_hand_sides: int) -> LowRankPreconditioner | None:
        """What makes conjugate gradients take fewer products, from the Gauss-Newton part.

        None where the loss is no cross-entropy on logits [b, Y], or where it would not pay: a small
        problem, or one of so many rows that few of them do not stand for all.

        Args:
            damping: of the system, positive.
            right_hand_sides: how many are solved for at a time.
        """
        count = rows_worth_taking(self.rows, self.dim, right_hand_sides)
        if count == 0 or not self._is_softmax():
            return None
        with memory_for(f"{count} rows of {self.dim} parameters", "pass preconditioner=None to cg"):
            return preconditioner_of(self._factor(count), damping)

    def _is_softmax(self) -> bool:
        """Whether the Gauss-Newton part is that of softmax cross-entropy."""
        return is_cross_entropy(self._loss.loss_fn)

    def _factor(self, count: int) -> Tensor | None:
        """Rows [count, p] of the Gauss-Newton part's factor, in any order; see factor.py."""
        logits, shares = [], []
        for inputs, targets, weights in self._loss.chunks(self._chunk):
            with differentiable(self._loss.model), torch.no_grad():
                outputs = self._loss.outputs(inputs)
            if not isinstance(outputs, Tensor) or outputs.dim() != 2:
                return None
            logits.append(outputs)
            share = self._loss.shares(outputs, weights)
            shares.append(share * target_mass(self._loss.loss_fn, targets).to(share))
        chosen = output_directions(torch.cat(logits).softmax(1), torch.cat(shares), count)
        if chosen is None:
            return None
        result = torch.empty(len(chosen.rows), self.dim, dtype=self.dtype, device=self.device)
        row = done = 0
        for inputs, _, _ in self._loss.chunks(self._chunk):
            n = batch_rows(inputs)
            here = ((chosen.rows >= row) & (chosen.rows < row + n)).nonzero()[:, 0]
            for part in here.split(FACTOR_ROWS) if len(here) else ():
                some = cut(inputs, chosen.rows[part] - row)
                gradients = self._example_gradients(some, chosen.directions[part])
                result[done : done + len(part)] = self.selection.join(gradients)
                done += len(part)
            row += n
        return result

    def _example_gradients(self, inputs: Any, directions: Tensor) -> list[Tensor]:
        """Each example's gradient of its outputs along its direction, [r, *shape] per leaf."""
        found = []
        for i in range(len(directions)):
            one = slice(i, i + 1)
            with differentiable(self._loss.model), torch.enable_grad():
                value = (self._loss.outputs(cut(inputs, one)) * directions[one]).sum()
                if not value.requires_grad:  # the first product will say so
                    return [p.new_zeros(len(directions), *p.shape) for p in self._leaves]
                found.append(torch.autograd.grad(value, self._leaves, materialize_grads=True))
        return [torch.stack(parts) for parts in zip(*found, strict=True)]

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """[p] or [R, p] to a tensor per parameter, zero where a mask leaves entries out."""
        batch = v if v.dim() == 2 else v[None]
        parts = self.selection.split(batch)
        names = self.selection.touched
        return {
            name: part if v.dim() == 2 else part[0] for name, part in zip(names, parts, strict=True)
        }

    def _check(self, v: Tensor) -> None:
        check_vector(v, self.dim, self.dtype, self.device)

    def _tensors(self, v: Tensor) -> list[Tensor]:
        directions = self.selection.split(v.detach())
        if v.shape[0] == 0:
            return directions
        total: list[Tensor] | None = None
        with self._memory(v.shape[0]), full_precision(self.device):
            for prepared in self._prepared():
                groups = zip(*(d.split(self._together) for d in directions), strict=True)
                products = [self._multiply(prepared, list(group)) for group in groups]
                part = [torch.cat(p) if len(p) > 1 else p[0] for p in zip(*products, strict=True)]
                total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
        self._loss.require_connection()
        assert total is not None
        return total

    def _prepared(self) -> Iterator[Any]:
        """What `_prepare` makes of each chunk."""
        if self._kept is not None:
            yield from self._kept
            return
        kept = []
        for chunk in self._loss.chunks(self._chunk):
            prepared = self._prepare(chunk)
            if self.cached:
                kept.append(prepared)
            yield prepared
        if self.cached:
            self._kept = kept

    def _memory(self, directions: int) -> AbstractContextManager[None]:
        rows = min(self._chunk, BATCH, self.rows)
        kept = (
            f", beside kept graphs of about {self.graph_bytes / 1e6:.0f} MB" if self.cached else ""
        )
        return memory_for(
            f"a product of {min(directions, self._together)} vector(s) of {self.dim} parameters on "
            f"a chunk of {rows} of {self.rows} rows{kept}",
            f"pass a chunk_size= below {rows}, a smaller graph_memory=, or fewer rows or vectors",
        )

    def _try_product(self) -> None:
        """A product with the first few rows must come out the same twice.

        Directions go through one at a time where torch cannot take several: the second backward
        pass of group_norm is wrong about shapes there (torch 2.13).
        """
        chunk = next(self._loss.chunks(FEW))
        both = self._random_directions(2)
        one = [d[:1] for d in both]
        with kept_rng(self.device), full_precision(self.device):
            once, again = (self._multiply(self._prepare(chunk), one) for _ in range(2))
            self._same(once, again)
            try:
                several = self._multiply(self._prepare(chunk), both)
            except RuntimeError:
                self._batches = False
            else:
                self._same(once, [product[:1] for product in several])

    def _same(self, once: list[Tensor], again: list[Tensor]) -> None:
        tolerance = torch.finfo(self.dtype).eps ** 0.5
        for a, b in zip(once, again, strict=True):
            if not torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
                raise ValueError(
                    "the same curvature product comes out differently twice; make the backward "
                    "pass of model and loss_fn reproducible (no random numbers in it)"
                )

    def _random_directions(self, count: int) -> list[Tensor]:
        """Directions [count, *shape] per leaf, always the same."""
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(count, self.dim, generator=generator, dtype=torch.float64)
        return self.selection.split(v.to(self.device, self.dtype))

    def _graph_bytes_per_row(self) -> float:
        """Bytes that the kept graph takes per row: its growth over the first rows."""
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
        own |= {t.untyped_storage().data_ptr() for t in tensors_of(chunk)}
        seen: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return t.detach()  # a reference to t itself would keep the graph alive for ever

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            # held until the count is done, so that no address is used twice
            prepared = self._prepare(chunk)
        for t in tensors_of(prepared):
            pack(t)
        del prepared
        return sum(seen.values())


def check_vector(v: Tensor, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Require v [dim] or [R, dim] of the operator's dtype and device."""
    if not isinstance(v, Tensor) or v.dim() not in (1, 2) or v.shape[-1] != dim:
        got = list(v.shape) if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(f"H @ v: v must have shape [{dim}] or [R, {dim}], got {got}")
    if v.dtype != dtype or v.device != device:
        raise ValueError(
            f"H @ v: v is {v.dtype} on {v.device}, the parameters are {dtype} on "
            f"{device}; use v.to(H.device, H.dtype)"
        )


def batched_vjp(
    outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]
) -> list[Tensor]:
    """The vector-Jacobian products for R cotangents [R, *shape] each, [R, *shape] per input.

    One backward pass for all R; vmap has a cost of its own, which a single one need not pay.
    """
    live = [i for i, out in enumerate(outputs) if out.requires_grad]
    count = cotangents[0].shape[0]
    if not live:
        return [x.new_zeros(count, *x.shape) for x in inputs]
    single = count == 1
    found = torch.autograd.grad(
        [outputs[i] for i in live],
        inputs,
        [cotangents[i][0] if single else cotangents[i] for i in live],
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=not single,
    )
    return [
        x.new_zeros(count, *x.shape) if f is None else f.detach()[None] if single else f.detach()
        for f, x in zip(found, inputs, strict=True)
    ]
