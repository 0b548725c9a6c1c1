"""One pass of a model over a DataLoader, every rank its part of the batches."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext.data import split_batch
from fastif_ext.distributed.facts import empty, kind, model_bits
from fastif_ext.distributed.ranks import Ranks, opened
from fastif_ext.distributed.shards import LoaderPart, loader_part
from fastif_ext.extract import Extracted
from fastif_ext.extract import extract as extract_here
from fastif_ext.loaders import batch_range, start
from fastif_ext.stream import IGNORED, Layer


class ExtractedShard(NamedTuple):
    """A rank's part of what one pass over n rows gave, on the CPU."""

    first_row: int
    """Number of its first row in the whole."""
    n: int
    """Rows of the whole."""
    logits: Tensor
    """[b, Y], b may be 0."""
    features: Tensor | None
    """[b, d], or None on all ranks."""
    labels: Tensor | None
    """int64 [b], or None on all ranks."""


def extract(
    model: nn.Module,
    loader: DataLoader[Any],
    *,
    layer: Layer = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    group: dist.ProcessGroup | Ranks | None = None,
) -> ExtractedShard:
    """Run the model once over the loader's rows, every rank over its part of them.

    The batches stay as they are and are shared out in contiguous stretches, so that the rows'
    logits and features are the same bits on any number of ranks (of the same kind of machine, with
    the same number of threads).

    Args:
        model: as for fastif_ext.extract, and so are all that are not explained here.
        loader: the whole data, the same on all ranks: a map-style dataset, not shuffled.
        layer: where features come from.
        device: where the model runs.
        progress: show a progress bar, on rank 0.
        group: a process group, the default one if None; or Ranks, which have a timeout.

    Returns:
        ExtractedShard, this rank's rows; `gathered` puts them together.

    Raises:
        ValueError: as fastif_ext.extract; a loader that shuffles.
        RankError: ranks disagree, one failed, or one does not come.

    Example:
        >>> import torch, torch.distributed as dist, fastif_ext as fi
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> data = DataLoader(TensorDataset(torch.randn(10, 4)), batch_size=4)
        >>> fi.distributed.extract(torch.nn.Linear(4, 3), data, progress=False).logits.shape
        torch.Size([10, 3])
        >>> dist.destroy_process_group()
    """
    ranks = opened(group)
    part = enter("extract", ranks, model, loader, layer, count=False)
    got = None
    if part.batches:
        with ranks.telling("extract"):
            got = extract_here(
                model,
                batch_range(loader, part.batches.start, part.batches.stop),  # type: ignore[arg-type]
                layer=layer,
                device=device,
                progress=progress and ranks.rank == 0,
            )
    return ExtractedShard(*_filled(ranks, got))


def enter(
    what: str,
    ranks: Ranks,
    model: nn.Module | None,
    loader: DataLoader[Any],
    layer: Layer,
    *,
    count: bool = True,
) -> LoaderPart:
    """All ranks agree on a pass over a loader; this rank's part of it.

    Where rows are tokens, their numbers are those of tokens with `count`, and the labels are read.
    """
    with ranks.telling(what):
        part = loader_part(loader, ranks.rank, ranks.size)
        own = _count_rows(loader, part) if count else len(part.rows)
        facts: dict[str, object] = {
            "length of the data": part.n,
            "batches": len(loader),
            "rows cut at": part.cuts,
            "layer": layer,
            "model": None if model is None else model_bits(model),
        }
    ends = [0, *accumulate(ranks.meet(what, own, **facts))]
    return LoaderPart(part.batches, range(ends[ranks.rank], ends[ranks.rank + 1]), ends[-1], ends)


def _count_rows(loader: DataLoader[Any], part: LoaderPart) -> int:
    """Rows of this rank's batches; where labels are [batch, T], labelled tokens: they are read."""
    count = 0
    for batch in start(batch_range(loader, part.batches.start, part.batches.stop)):
        labels = split_batch(batch)[1]
        if labels is None or torch.as_tensor(labels).dim() < 2:
            return len(part.rows)
        count += int((torch.as_tensor(labels) != IGNORED).sum())
    return count


def gathered(
    shard: ExtractedShard,
    *,
    to: int | None = None,
    group: dist.ProcessGroup | Ranks | None = None,
) -> Extracted | None:
    """All ranks' rows put together, on all ranks or on one.

    Args:
        shard: what extract gave on this rank.
        to: the rank that gets the whole, the others get None; None for all.
        group: as for extract.

    Returns:
        Extracted(logits [n, Y], features [n, d] or None, labels int64 [n] or None).

    Raises:
        RankError: ranks disagree, one failed, or one does not come.
    """
    ranks = opened(group)
    ranks.meet("gathered", **{"length of the data": shard.n})
    logits, features, labels = (
        None if rows is None else ranks.gather_rows(f"gathered: {name}", rows, to=to)
        for name, rows in zip(shard._fields[2:], shard[2:], strict=True)
    )
    return None if logits is None else Extracted(logits, features, labels)


def _filled(ranks: Ranks, got: Extracted | None) -> tuple[Any, ...]:
    """First row, rows of all, and tensors: as wide as the others' where it has no rows."""
    said = ranks.meet("extract: rows", None if got is None else [kind(t) for t in got])
    lengths = [0 if kinds is None else kinds[0][0][0] for kinds in said]
    first, n = sum(lengths[: ranks.rank]), sum(lengths)
    if got is not None:
        return first, n, *got
    kinds = next(words for words in said if words is not None)
    return first, n, *(empty(k, rows=0) for k in kinds)
