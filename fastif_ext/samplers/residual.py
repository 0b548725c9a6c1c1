"""Residual sampling: rows that stand for the mean gradient of a set."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext.device import with_kernels
from fastif_ext.samplers.base import (
    SubsetSampler,
    check_labels,
    check_logits,
    check_size,
    require_labels,
    row_blocks,
)
from fastif_ext.samplers.drive import drive
from fastif_ext.samplers.fold import ColumnFold
from fastif_ext.samplers.sizes import bottom_k, check_seed, check_share, mixture
from fastif_ext.stream import ExtractedBatch


class ResidualSampler(SubsetSampler):
    """Rows for the mean gradient over a set, drawn by residual norm |p_i - e_y|, weighted by 1/pi.

    A row's gradient through a softmax is proportional to its residual; a few hundred of them stand
    for the whole removal set. Weights are Horvitz-Thompson: sum_j w_j g_j is unbiased for the mean.

    Args:
        logits: [n, Y] of the rows of the set.
        labels: int64 [n].
        m: rows to draw, 1 <= m <= n.
        uniform: share of the uniform part, in [0, 1].
        seed: the same seed draws the same rows.

    Raises:
        ValueError: NaN logits, labels out of range, m or uniform out of range.

    Example:
        >>> import torch, fastif_ext as fi
        >>> fi.ResidualSampler(torch.randn(100, 3), torch.arange(100) % 3, 10, seed=0)
        ResidualSampler(10 of 100 rows)
    """

    def __init__(
        self, logits: Tensor, labels: Tensor, m: int, *, uniform: float = 0.2, seed: int = 0
    ) -> None:
        fold = ResidualFold(m, uniform=uniform, seed=seed)
        fold.update(ExtractedBatch(0, logits, None, labels))
        super().__init__(*fold.subset())

    @classmethod
    def from_loader(
        cls,
        model: nn.Module,
        loader: DataLoader[Any],
        m: int,
        *,
        uniform: float = 0.2,
        seed: int = 0,
        device: torch.device | str | None = None,
        progress: bool = True,
        state: str | os.PathLike[str] | None = None,
    ) -> ResidualSampler:
        """The same sampler in one pass over a loader with labels; one float per row is kept.

        Args:
            model: maps inputs to logits; see fastif_ext.extract.
            loader: a DataLoader of the set, that does not shuffle.
            m: rows to draw.
            uniform: share of the uniform part.
            seed: the same seed draws the same rows.
            device: where the model runs.
            progress: show a progress bar.
            state: a file that keeps what was read, to go on after an interruption; see
                fastif_ext.samplers.drive.
        """
        fold = ResidualFold(m, uniform=uniform, seed=seed)
        sampler: ResidualSampler = drive(
            fold, model, loader, device=device, progress=progress, state=state
        )
        return sampler


class ResidualFold(ColumnFold):
    """The residual norm of each row, 4 bytes."""

    sampler = ResidualSampler

    def __init__(self, m: int, *, uniform: float = 0.2, seed: int = 0) -> None:
        check_share("ResidualSampler", uniform)
        check_seed("ResidualSampler", seed)
        super().__init__(("sizes",), m=m, uniform=uniform, seed=seed)
        self.m, self.uniform, self.seed = m, uniform, seed

    def _rows(self, batch: ExtractedBatch) -> tuple[Tensor, ...]:
        logits = check_logits(self.name, with_kernels(batch.logits), first_row=batch.row_offset)
        n, classes = logits.shape
        labels = require_labels(self.name, batch.labels)
        labels = check_labels(self.name, labels, n=n, classes=classes).to(logits.device)
        norms = torch.empty(n, dtype=torch.float32, device=logits.device)
        for rows in row_blocks(logits):
            residual = logits[rows].softmax(1, dtype=torch.float64)
            place = labels[rows, None]
            residual.scatter_add_(1, place, residual.new_full(place.shape, -1.0))
            norms[rows] = residual.norm(dim=1).float().nan_to_num_(0.0)  # of nothing but -inf
        return (norms.cpu(),)

    def _draw(self) -> tuple[Tensor, Tensor]:
        check_size(self.name, self.rows, self.m)
        sizes = mixture(self.name, self.columns["sizes"].tensor(), self.m, self.uniform)
        return bottom_k(sizes, self.m, self.seed)
