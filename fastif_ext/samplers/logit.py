"""The paper's logit sampler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext import ops
from fastif_ext.device import with_kernels
from fastif_ext.extract import stream
from fastif_ext.samplers.base import SubsetSampler, check_labels, check_logits


class LogitSampler(SubsetSampler):
    """The paper's logit sampler: for each class y, k rows drawn by their probability of y.

    Row i is drawn for class y with probability proportional to softmax(logits_i)_y, over all rows
    or over those labelled y. A row drawn for two classes stands in the subset twice. Weights are
    1/m with m = Y k, as in the paper.

    Args:
        logits: [n, Y].
        samples_per_class: k, rows for each of the Y classes.
        replacement: draw with replacement within a class.
        labels: where given, int64 [n], class y draws from the rows labelled y only.
        seed: the same seed draws the same rows, whatever the batches or threads.

    Raises:
        ValueError: NaN logits, a class with fewer than k rows, labels that do not fit.

    Example:
        >>> import torch, fastif_ext as fi
        >>> len(fi.LogitSampler(torch.randn(100, 5), 3, seed=0))
        15
    """

    def __init__(
        self,
        logits: Tensor,
        samples_per_class: int,
        *,
        replacement: bool = False,
        labels: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        logits = check_logits("LogitSampler", logits)
        sample = self._draw(logits, samples_per_class, replacement, labels, seed, row_offset=0)
        self._finish(len(logits), sample)

    @classmethod
    def from_loader(
        cls,
        model: nn.Module,
        loader: DataLoader[Any],
        samples_per_class: int,
        *,
        replacement: bool = False,
        by_label: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> LogitSampler:
        """The same sampler in one pass over a loader, in O(k Y) memory.

        It draws exactly the rows that ``LogitSampler(all logits, ...)`` would.

        Args:
            model: maps inputs to logits; see fastif_ext.extract.
            loader: a DataLoader that does not shuffle.
            samples_per_class: rows for each class.
            replacement: draw with replacement within a class.
            by_label: class y draws from the rows labelled y only.
            seed: the same seed draws the same rows.
            device: where the model runs.
            progress: show a progress bar.
        """
        total, n = None, 0
        for batch in stream(model, loader, device=device, progress=progress):
            logits = with_kernels(batch.logits)
            logits = check_logits("LogitSampler", logits, first_row=batch.row_offset)
            if by_label and batch.labels is None:
                raise ValueError("LogitSampler: by_label=True, but the loader's batches hold none")
            labels = batch.labels if by_label else None
            part = cls._draw(logits, samples_per_class, replacement, labels, seed, batch.row_offset)
            total = part if total is None else ops.merge_samples(total, part)
            n += len(logits)
        if total is None:
            raise ValueError("LogitSampler: loader gave no batch")
        sampler = cls.__new__(cls)
        sampler._finish(n, total)
        return sampler

    @staticmethod
    def _draw(
        logits: Tensor,
        k: int,
        replacement: bool,
        labels: Tensor | None,
        seed: int,
        row_offset: int,
    ) -> ops.ClassSample:
        if labels is None:
            return ops.class_multinomial(
                logits, k, replacement=replacement, seed=seed, row_offset=row_offset
            )
        labels = check_labels("LogitSampler", labels, n=len(logits), classes=logits.shape[1])
        probs = logits.softmax(1, dtype=torch.float32)
        place = labels[:, None].to(probs.device)
        own = torch.zeros_like(probs).scatter_(1, place, probs.gather(1, place))
        return ops.bottom_k(own.T, k, replacement=replacement, seed=seed, row_offset=row_offset)

    def _finish(self, n: int, sample: ops.ClassSample) -> None:
        short = (sample.rows < 0).any(1).nonzero().flatten().tolist()
        if short:
            k, y = sample.rows.shape[1], short[0]
            raise ValueError(
                f"LogitSampler: samples_per_class = {k}, but class {y} has only "
                f"{int((sample.rows[y] >= 0).sum())} rows of positive probability; lower it or use "
                f"replacement=True"
            )
        SubsetSampler.__init__(self, n, sample.rows.flatten())
