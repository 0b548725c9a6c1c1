"""Operators whose products are written out where a network is a chain, and torch's elsewhere."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from fastif_ext.curvature.layered import LayeredProducts
from fastif_ext.curvature.operator import FEW, CurvatureOperator
from fastif_ext.data import batch_rows, tensors_of
from fastif_ext.device import full_precision
from fastif_ext.objective import Chunk


class ByHand(CurvatureOperator):
    """Takes products by hand where they can be had and agree with torch's on a few rows.

    A subclass says how products are made by hand (`_write_out`) and by torch: what is made once for
    a chunk (`_graph`) and how directions go through it (`_through`).
    """

    _layered: LayeredProducts | None = None

    @property
    def by_hand(self) -> bool:
        """Whether products are written out (see fastif_ext.curvature.layered), not torch's."""
        return self._layered is not None

    @abstractmethod
    def _write_out(self) -> LayeredProducts | None:
        """The products by hand; None for models and losses of another kind."""

    @abstractmethod
    def _graph(self, chunk: Chunk) -> Any:
        """What torch's products with a chunk's rows need."""

    @abstractmethod
    def _through(self, graph: Any, directions: list[Tensor]) -> list[Tensor]:
        """The chunk's part of torch's products with R directions, both [R, *shape] per leaf."""

    def _try_product(self) -> None:
        layered = self._write_out()
        if layered is not None and self._agrees(layered):
            self._layered = layered
        else:
            super()._try_product()

    def _agrees(self, layered: LayeredProducts) -> bool:
        """Whether a product by hand is torch's, on a few rows."""
        chunk = next(self._loss.chunks(FEW))
        directions = self._random_directions(1)
        with full_precision(self.device):
            prepared = layered.prepare(chunk)
            if prepared is None:
                return False
            found = layered.multiply(prepared, directions)
            wanted = self._through(self._graph(chunk), directions)
        largest = max((float(w.abs().max()) for w in wanted if w.numel()), default=0.0)
        tolerance = 1e3 * torch.finfo(self.dtype).eps * largest
        return all(
            torch.allclose(f, w, rtol=0, atol=tolerance) for f, w in zip(found, wanted, strict=True)
        )

    def _graph_bytes_per_row(self) -> float:
        if self._layered is None or self._layered.keeps_graph:
            return super()._graph_bytes_per_row()
        chunk = next(self._loss.chunks(FEW))  # what is kept by hand is so many numbers for each row
        kept = tensors_of(self._layered.prepare(chunk))
        return sum(t.nbytes for t in kept) / batch_rows(chunk[0])

    def _prepare(self, chunk: Chunk) -> Any:
        return self._graph(chunk) if self._layered is None else self._layered.prepare(chunk)

    def _multiply(self, prepared: Any, directions: list[Tensor]) -> list[Tensor]:
        if self._layered is None:
            return self._through(prepared, directions)
        return self._layered.multiply(prepared, directions)

    def _example_gradients(self, inputs: Any, directions: Tensor) -> list[Tensor]:
        if self._layered is None:
            return super()._example_gradients(inputs, directions)
        return self._layered.example_gradients(inputs, directions)
