"""Parts of a DataLoader: some of its batches, how many there are, where their rows begin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

DRAWING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)
"""Samplers that give rows in another order, or not all."""


class _Range:
    """The indices of some of a loader's batches."""

    def __init__(self, indices: Any, first: int, stop: int | None) -> None:
        self.indices, self.first, self.stop = indices, first, stop

    def __iter__(self) -> Iterator[Any]:
        return islice(self.indices, self.first, self.stop)

    def __len__(self) -> int:
        stop = len(self.indices) if self.stop is None else min(self.stop, len(self.indices))
        return max(stop - self.first, 0)


def batch_range(loader: DataLoader[Any], first: int = 0, stop: int | None = None) -> Iterable[Any]:
    """The batches first <= i < stop of a loader, each as the loader itself would give it.

    Of a map-style dataset no other rows are loaded; an iterable one is read from its beginning.

    Args:
        loader: a DataLoader, or any iterable of batches.
        first: the first batch.
        stop: the batch after the last one; None: to the end.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from fastif_ext.loaders import batch_range
        >>> [batch.tolist() for batch in batch_range(DataLoader(range(7), 2), 2, 4)]
        [[4, 5], [6]]
    """
    if first == 0 and stop is None:
        return loader
    if not _has_indices(loader):
        return islice(loader, first, stop)
    options: dict[str, Any] = {
        name: getattr(loader, name)
        for name in (
            *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn"),
            *("multiprocessing_context", "generator", "prefetch_factor"),
        )
    }
    if loader.batch_sampler is None:
        part = _Range(loader.sampler, first, stop)
        return DataLoader(loader.dataset, batch_size=None, sampler=part, **options)
    return DataLoader(
        loader.dataset, batch_sampler=_Range(loader.batch_sampler, first, stop), **options
    )


def batch_count(loader: DataLoader[Any]) -> int | None:
    """How many batches a loader has; None where it cannot tell."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # an iterable dataset without a length
        return None


def rows_before(loader: DataLoader[Any], batch: int) -> int:
    """How many rows come before a batch of a loader over a map-style dataset.

    Args:
        loader: a DataLoader; none of its rows is loaded.
        batch: number of the batch.

    Raises:
        TypeError: the loader does not tell, as one over an iterable dataset.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from fastif_ext.loaders import rows_before
        >>> rows_before(DataLoader(range(7), 2), 3)
        6
    """
    if not _has_indices(loader):
        raise TypeError(
            f"rows_before: a {type(loader).__name__} over a {type(loader.dataset).__name__} does "
            f"not tell how many rows its batches have; use a map-style dataset"
        )
    indices: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if type(indices) is BatchSampler:
        return min(batch * indices.batch_size, len(indices.sampler))  # type: ignore[arg-type]
    return sum(_length(index, loader) for index in islice(indices, batch))


def check_loader(loader: DataLoader[Any]) -> None:
    """Require batches, and that their rows come in the order of the dataset.

    Raises:
        TypeError: it is a dataset, whose examples would be taken for batches.
        ValueError: the loader draws its rows, or gives its batches as they get ready.
    """
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise TypeError(
            f"loader is a dataset, a {type(loader).__name__}, whose examples would be taken for "
            f"batches; pass DataLoader(dataset, batch_size=512)"
        )
    for sampler in _samplers(loader):
        if isinstance(sampler, DRAWING) or getattr(sampler, "draws_rows", False):
            raise ValueError(
                f"loader draws its rows with a {type(sampler).__name__}, so the sampled rows could "
                f"not be found in the dataset again; pass a DataLoader with shuffle=False"
            )
    if not getattr(loader, "in_order", True) and loader.num_workers > 1:
        raise ValueError(
            "loader has in_order=False, so the sampled rows could not be found in the dataset "
            "again; pass a DataLoader with in_order=True"
        )


def _samplers(loader: Any) -> list[Any]:
    """What chooses a loader's rows: samplers, and those that they choose among."""
    found: list[Any] = []
    left = [getattr(loader, name, None) for name in ("batch_sampler", "sampler")]
    while left:
        sampler = left.pop()
        if sampler is not None and all(sampler is not other for other in found):
            found.append(sampler)
            left.append(getattr(sampler, "sampler", None))
    return found


def start(batches: Iterable[Any]) -> Iterator[Any]:
    """iter(batches), leaving torch's global generator alone: DataLoaders draw a seed from it."""
    rng = torch.get_rng_state()
    try:
        return iter(batches)
    finally:
        torch.set_rng_state(rng)


def _has_indices(loader: DataLoader[Any]) -> bool:
    """Whether its batches come from indices: a map-style dataset, and no iteration of its own."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
    )


def _length(index: Any, loader: DataLoader[Any]) -> int:
    if isinstance(index, slice):
        return len(range(*index.indices(len(loader.dataset))))  # type: ignore[arg-type]
    if not hasattr(index, "__len__"):
        raise TypeError(
            f"rows_before: loader has batch_size=None and reads by {type(index).__name__}, which "
            f"does not tell how many rows its batches have; give it a batch_size"
        )
    return len(index)
