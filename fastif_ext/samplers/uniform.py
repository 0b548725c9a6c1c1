"""All rows, random rows, label-stratified rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastif_ext.samplers.base import SubsetSampler, check_labels, check_size, generator


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
        check_size("RandomSampler", n, m)
        super().__init__(n, torch.randperm(n, generator=generator(seed))[:m])


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
        super().__init__(n, kept, weight[group[kept]])


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
