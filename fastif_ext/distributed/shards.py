"""Who works on which rows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Subset, TensorDataset

from fastif_ext.data import Rows, cut
from fastif_ext.loaders import check_loader, rows_before


def shard(n: int, rank: int, size: int, *, multiple: int = 1) -> range:
    """The rows of a rank: a contiguous part of n rows, cut at multiples of a number.

    Args:
        n: rows in all.
        rank: which of the `size` ranks.
        size: number of ranks.
        multiple: rows that stay together, such as those of a batch.

    Returns:
        Its rows; none where there are more ranks than parts.

    Raises:
        ValueError: a rank that is not in [0, size), n < 0, multiple < 1.

    Example:
        >>> from fastif_ext.distributed import shard
        >>> [list(shard(5, r, 3)) for r in range(3)], shard(100, 1, 2, multiple=32)
        ([[0], [1, 2], [3, 4]], range(64, 100))
    """
    if not 0 <= rank < size or n < 0 or multiple < 1:
        raise ValueError(
            f"shard: rank must be in [0, size), n at least 0 and multiple at least 1; got rank "
            f"{rank} of {size}, n = {n}, multiple = {multiple}"
        )
    parts = math.ceil(n / multiple)
    ends = (min(n, r * parts // size * multiple) for r in (rank, rank + 1))
    return range(*ends)


def part_of(data: Rows, rows: range) -> Any:
    """A contiguous part of tensors (a view of them) or of a map-style dataset."""
    if isinstance(data, tuple):
        return cut(data, slice(rows.start, rows.stop))
    if type(data) is TensorDataset:
        return TensorDataset(*cut(data.tensors, slice(rows.start, rows.stop)))
    return Subset(data, rows)


class LoaderPart(NamedTuple):
    """A rank's part of a loader."""

    batches: range
    """Numbers of its batches."""
    rows: range
    """Numbers of their rows."""
    n: int
    """Rows of the whole loader."""
    cuts: list[int]
    """Where all ranks' rows begin, and the last end."""


def loader_part(loader: DataLoader[Any], rank: int, size: int) -> LoaderPart:
    """A rank's part of a loader: whole batches, contiguous.

    Batches stay together, so that a model's outputs are the same bits whichever rank makes them.

    Args:
        loader: of a map-style dataset, without shuffling.
        rank: which of the `size` ranks.
        size: number of ranks.

    Raises:
        ValueError, TypeError: a loader that shuffles, or cannot tell its rows.
    """
    check_loader(loader)
    total = len(loader)
    batches = shard(total, rank, size)
    cuts = [rows_before(loader, shard(total, r, size).start) for r in range(size)]
    cuts.append(rows_before(loader, total))
    if cuts[-1] == 0:
        raise ValueError("loader gave no batch; it needs at least one row")
    return LoaderPart(batches, range(cuts[rank], cuts[rank + 1]), cuts[-1], cuts)
