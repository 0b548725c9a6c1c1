"""The paper's logit sampler."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext import ops
from fastif_ext.device import with_kernels
from fastif_ext.extract import ExtractedBatch
from fastif_ext.samplers.base import (
    SubsetSampler,
    check_labels,
    check_logits,
    require_labels,
    row_blocks,
)
from fastif_ext.samplers.drive import drive
from fastif_ext.samplers.fold import Fold


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
        fold = LogitFold(
            samples_per_class, replacement=replacement, by_label=labels is not None, seed=seed
        )
        fold.update(ExtractedBatch(0, logits, None, labels))
        super().__init__(*fold.subset())

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
        state: str | os.PathLike[str] | None = None,
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
            state: a file that keeps what was read, to go on after an interruption; see
                fastif_ext.samplers.drive.
        """
        fold = LogitFold(samples_per_class, replacement=replacement, by_label=by_label, seed=seed)
        sampler: LogitSampler = drive(
            fold, model, loader, device=device, progress=progress, state=state
        )
        return sampler


class LogitFold(Fold):
    """The k best rows of each class: O(k Y) memory, whatever the number of rows."""

    sampler = LogitSampler

    def __init__(
        self,
        samples_per_class: int,
        *,
        replacement: bool = False,
        by_label: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            samples_per_class=samples_per_class,
            replacement=replacement,
            by_label=by_label,
            seed=seed,
        )
        self.by_label = by_label
        self._options: dict[str, Any] = {"replacement": replacement, "seed": seed}
        self.k = samples_per_class
        self._sample: ops.ClassSample | None = None

    def _update(self, batch: ExtractedBatch) -> None:
        logits = check_logits(self.name, with_kernels(batch.logits), first_row=batch.row_offset)
        if self.by_label:
            n, classes = logits.shape
            labels = require_labels(self.name, batch.labels)
            labels = check_labels(self.name, labels, n=n, classes=classes).to(logits.device)
            for rows in row_blocks(logits):
                self._add(
                    ops.bottom_k(
                        _own_probabilities(logits[rows], labels[rows]).T,
                        self.k,
                        row_offset=batch.row_offset + rows.start,
                        **self._options,
                    )
                )
        else:
            self._add(
                ops.class_multinomial(logits, self.k, row_offset=batch.row_offset, **self._options)
            )

    def _add(self, sample: ops.ClassSample) -> None:
        if self._sample is not None:
            sample = ops.merge_samples(self._sample, _moved(sample, self._sample.rows.device))
        self._sample = sample

    def _merge(self, other: Any) -> None:
        assert other._sample is not None
        self._add(other._sample)

    def _state(self) -> dict[str, Any]:
        return {} if self._sample is None else _moved(self._sample, "cpu")._asdict()

    def _load(self, state: dict[str, Any]) -> None:
        self._sample = ops.ClassSample(**state) if state else None

    def _draw(self) -> tuple[Tensor, None]:
        assert self._sample is not None
        rows = self._sample.rows
        short = (rows < 0).any(1).nonzero().flatten().tolist()
        if short:
            raise ValueError(
                f"LogitSampler: samples_per_class = {self.k}, but class {short[0]} has only "
                f"{int((rows[short[0]] >= 0).sum())} rows of positive probability; lower it or use "
                f"replacement=True"
            )
        return rows.flatten(), None


def _own_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """The softmax where the class is the row's label, 0 elsewhere, float32 [n, Y]."""
    probs, place = logits.softmax(1, dtype=torch.float32), labels[:, None]
    return torch.zeros_like(probs).scatter_(1, place, probs.gather(1, place))


def _moved(sample: ops.ClassSample, device: torch.device | str) -> ops.ClassSample:
    return ops.ClassSample(*(t.to(device) for t in sample))
