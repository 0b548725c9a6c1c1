"""Who works on which rows, and what must be the same on all ranks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler, Subset, TensorDataset

from fastif_ext.data import count, cut


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


def part_of(data: tuple[Any, Tensor] | Dataset[Any], rows: range) -> Any:
    """A contiguous part of tensors (a view of them) or of a map-style dataset."""
    if isinstance(data, tuple):
        return cut(data, slice(rows.start, rows.stop))
    if type(data) is TensorDataset:
        return TensorDataset(*cut(data.tensors, slice(rows.start, rows.stop)))
    return Subset(data, rows)


def loader_part(loader: DataLoader[Any], rank: int, size: int) -> tuple[DataLoader[Any], range]:
    """A loader of a rank's part of the batches, and its rows.

    The batches are those of the loader: their rows together, so that a model's outputs are the same
    bits whichever rank makes them.

    Args:
        loader: of a map-style dataset in its order; or with batch_size=None and a list of slices.
        rank: which of the `size` ranks.
        size: number of ranks.

    Raises:
        ValueError: a loader that draws rows in another order, or drops some.
    """
    batches = loader_batches(loader)
    own = shard(len(batches), rank, size)
    chosen = batches[own.start : own.stop]
    first = chosen[0].start if chosen else 0
    order: dict[str, Any] = (
        {"batch_size": None, "sampler": [slice(b.start, b.stop) for b in chosen]}
        if loader.batch_size is None
        else {"batch_sampler": chosen}
    )
    part = DataLoader(
        loader.dataset,
        **order,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),  # it draws a seed: not from torch's global generator
        prefetch_factor=loader.prefetch_factor,
    )
    return part, range(first, chosen[-1].stop if chosen else first)


def loader_batches(loader: DataLoader[Any]) -> list[range]:
    """The rows of each batch of a loader, which must give all of a map-style dataset in order."""
    whole, size = range(count(loader.dataset)), loader.batch_size
    batches: list[range] = []
    if size is None and isinstance(loader.sampler, list):
        batches = [whole[part] for part in loader.sampler if isinstance(part, slice)]
    elif size is not None and type(loader.sampler) is SequentialSampler:
        last = len(whole) // size * size if loader.drop_last else len(whole)
        batches = [whole[i : i + size] for i in range(0, last, size)]
    starts = [0, *(batch.stop for batch in batches)]
    if starts[:-1] == [batch.start for batch in batches] and starts[-1] == len(whole):
        return batches
    raise ValueError(
        "loader must give all rows of a map-style dataset in their order, so that ranks can share "
        "its batches: pass DataLoader(dataset, batch_size) without shuffle, sampler or drop_last"
    )


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A short text that differs where names, shapes, dtypes or bits of tensors differ."""
    digest = hashlib.sha256()
    for name, t in tensors:
        digest.update(f"{name} {list(t.shape)} {t.dtype} {bit_sum(t)};".encode())
    return digest.hexdigest()[:16]


def model_fingerprint(model: nn.Module) -> str:
    """A short text that differs where parameters or buffers of models differ."""
    return fingerprint([*model.named_parameters(), *model.named_buffers()])


def bit_sum(t: Tensor) -> int:
    """The sum of a tensor's bits, taken as integers: exact in any order, on any device."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(t.element_size(), torch.uint8)
    return int(t.detach().reshape(-1).view(words).sum(dtype=torch.int64))
