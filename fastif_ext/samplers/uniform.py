"""All rows, random rows, label-stratified rows."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext.samplers.base import (
    SubsetSampler,
    check_labels,
    check_size,
    generator,
    require_labels,
)
from fastif_ext.samplers.drive import drive
from fastif_ext.samplers.fold import ColumnFold, Fold
from fastif_ext.stream import ExtractedBatch


class AllRows(SubsetSampler):
    """Every row once, weight 1/n: the Hessian of the whole data set.

    Args:
        n: number of rows.

    Example:
        >>> import fastif_ext as fi
        >>> fi.AllRows(3).indices
        tensor([0, 1, 2])
    """

    def __init__(self, n: int) -> None:
        check_size("AllRows", n, n)
        super().__init__(n, torch.arange(n))

    @classmethod
    def from_loader(
        cls,
        model: nn.Module | None,
        loader: DataLoader[Any],
        *,
        progress: bool = True,
        state: str | os.PathLike[str] | None = None,
    ) -> AllRows:
        """Every row of a loader; they are counted, the model is not run.

        Args:
            model: not run; it is there so that all samplers are called alike.
            loader: a DataLoader that does not shuffle.
            progress: show a progress bar.
            state: a file that keeps what was read, to go on after an interruption; see
                fastif_ext.samplers.drive.
        """
        fold = AllRowsFold()
        sampler: AllRows = drive(fold, None, loader, progress=progress, state=state)
        return sampler


class RandomSampler(SubsetSampler):
    """m of n rows without replacement, all alike; weights 1/m.

    Args:
        n: number of rows of the data set.
        m: rows to draw, 1 <= m <= n.
        seed: the same seed draws the same rows; torch's global generator is not touched.

    Raises:
        ValueError: m is not in [1, n].

    Example:
        >>> import fastif_ext as fi
        >>> fi.RandomSampler(1000, 10, seed=0)
        RandomSampler(10 of 1000 rows)
    """

    def __init__(self, n: int, m: int, *, seed: int = 0) -> None:
        super().__init__(n, *_random_rows(n, m, seed))

    @classmethod
    def from_loader(
        cls,
        model: nn.Module | None,
        loader: DataLoader[Any],
        m: int,
        *,
        seed: int = 0,
        progress: bool = True,
        state: str | os.PathLike[str] | None = None,
    ) -> RandomSampler:
        """The same sampler on the rows of a loader; they are counted, the model is not run.

        Args:
            model: not run; it is there so that all samplers are called alike.
            loader: a DataLoader that does not shuffle.
            m: rows to draw.
            seed: the same seed draws the same rows.
            progress: show a progress bar.
            state: a file that keeps what was read, to go on after an interruption; see
                fastif_ext.samplers.drive.
        """
        fold = RandomFold(m, seed=seed)
        sampler: RandomSampler = drive(fold, None, loader, progress=progress, state=state)
        return sampler


class StratifiedSampler(SubsetSampler):
    """Random rows within each label, as many as its share of the data; weights n_y / (n m_y).

    The control that a class-wise sampler has to beat. Shares are rounded to whole rows by largest
    remainder, every label gets at least one, and the weights undo the rounding: H_S is unbiased.

    Args:
        labels: integer labels, [n].
        m: rows to draw, at least one per label present, at most n.
        seed: the same seed draws the same rows.

    Raises:
        ValueError: m is out of range. TypeError: labels are not integers.

    Example:
        >>> import torch, fastif_ext as fi
        >>> sampler = fi.StratifiedSampler(torch.arange(100) % 4, 8, seed=0)
        >>> (sampler.indices % 4).bincount()
        tensor([2, 2, 2, 2])
    """

    def __init__(self, labels: Tensor, m: int, *, seed: int = 0) -> None:
        super().__init__(len(labels), *_stratified_rows(labels, m, seed))

    @classmethod
    def from_loader(
        cls,
        model: nn.Module | None,
        loader: DataLoader[Any],
        m: int,
        *,
        seed: int = 0,
        progress: bool = True,
        state: str | os.PathLike[str] | None = None,
    ) -> StratifiedSampler:
        """The same sampler on the labels of a loader's batches; the model is not run.

        Args:
            model: not run; it is there so that all samplers are called alike.
            loader: a DataLoader that does not shuffle; its batches hold labels.
            m: rows to draw.
            seed: the same seed draws the same rows.
            progress: show a progress bar.
            state: a file that keeps what was read, to go on after an interruption; see
                fastif_ext.samplers.drive.
        """
        fold = StratifiedFold(m, seed=seed)
        sampler: StratifiedSampler = drive(fold, None, loader, progress=progress, state=state)
        return sampler


class CountFold(Fold):
    """The number of rows."""

    def _update(self, batch: ExtractedBatch) -> None:
        pass

    def _merge(self, other: Any) -> None:
        pass

    def _state(self) -> dict[str, Any]:
        return {}

    def _load(self, state: dict[str, Any]) -> None:
        pass


class AllRowsFold(CountFold):
    """The number of rows."""

    sampler = AllRows

    def _draw(self) -> tuple[Tensor, None]:
        return torch.arange(self.rows), None


class RandomFold(CountFold):
    """The number of rows."""

    sampler = RandomSampler

    def __init__(self, m: int, *, seed: int = 0) -> None:
        super().__init__(m=m, seed=seed)
        self.m, self.seed = m, seed

    def _draw(self) -> tuple[Tensor, None]:
        return _random_rows(self.rows, self.m, self.seed)


class StratifiedFold(ColumnFold):
    """The label of each row, 8 bytes."""

    sampler = StratifiedSampler

    def __init__(self, m: int, *, seed: int = 0) -> None:
        super().__init__(("labels",), m=m, seed=seed)
        self.m, self.seed = m, seed

    def _rows(self, batch: ExtractedBatch) -> tuple[Tensor, ...]:
        labels = require_labels(self.name, batch.labels)
        return (check_labels(self.name, labels, n=len(batch.logits)),)

    def _draw(self) -> tuple[Tensor, Tensor]:
        return _stratified_rows(self.columns["labels"].tensor(), self.m, self.seed)


def _random_rows(n: int, m: int, seed: int) -> tuple[Tensor, None]:
    check_size("RandomSampler", n, m)
    return torch.randperm(n, generator=generator(seed))[:m], None


def _stratified_rows(labels: Tensor, m: int, seed: int) -> tuple[Tensor, Tensor]:
    labels = check_labels("StratifiedSampler", labels)
    n = len(labels)
    check_size("StratifiedSampler", n, m)
    present, group, counts = labels.unique(return_inverse=True, return_counts=True)
    if m < len(present):
        raise ValueError(
            f"StratifiedSampler: m = {m} is less than the {len(present)} labels present; each "
            f"needs a row, or use RandomSampler"
        )
    quota = _largest_remainder(counts, m)
    order = torch.randperm(n, generator=generator(seed))
    order = order[group[order].argsort(stable=True)]
    rank_in_group = torch.arange(n) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    kept = order[rank_in_group < quota.repeat_interleave(counts)]
    weight = counts.double() / (n * quota.double())
    return kept, weight[group[kept]]


def _largest_remainder(counts: Tensor, m: int) -> Tensor:
    """m rows shared in proportion to counts, at least one and at most counts[i] for each i."""
    share = counts.double() * (m / int(counts.sum()))
    quota = share.floor().long().clamp(min=1)
    while (left := m - int(quota.sum())) != 0:
        short = share - quota  # how far each is below its share
        able = quota < counts if left > 0 else quota > 1
        short[~able] = -torch.inf if left > 0 else torch.inf
        i = short.argmax() if left > 0 else short.argmin()
        quota[i] += 1 if left > 0 else -1
    return quota
