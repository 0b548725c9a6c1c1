"""Samplers in one pass that ranks share: each folds its rows, and the folds are merged."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext.distributed.extraction import enter
from fastif_ext.distributed.facts import empty, kind
from fastif_ext.distributed.ranks import Ranks, opened
from fastif_ext.samplers.fold import Fold
from fastif_ext.stream import Layer, stream


def sample(
    fold: Fold,
    model: nn.Module | None,
    loader: DataLoader[Any],
    *,
    layer: Layer = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    group: dist.ProcessGroup | Ranks | None = None,
) -> Any:
    """The sampler that a fold makes of all rows of a loader, every rank reading its part of them.

    The same subset on all ranks, and the same, bit for bit, as on any other number of them and as
    the sampler's from_loader: batches stay as they are, and folds merge exactly.

    Args:
        fold: what to draw: a new LogitFold, CurvatureFold, FeatureFold, ResidualFold, RandomFold,
            StratifiedFold or AllRowsFold of fastif_ext.samplers, with the same arguments on all
            ranks. It is used up.
        model: maps inputs to logits, the same on all ranks; None where the fold needs no logits.
        loader: the whole data, the same on all ranks: a map-style dataset, not shuffled.
        layer: where features come from, as in fastif_ext.extract.
        device: where the model runs.
        progress: show a progress bar, on rank 0.
        group: a process group, the default one if None; or Ranks, which have a timeout.

    Returns:
        The sampler, as fold.finish() gives it.

    Raises:
        ValueError: as the sampler; a loader that shuffles.
        RankError: ranks disagree, one failed, or one does not come.

    Example:
        >>> import torch, torch.distributed as dist, fastif_ext as fi
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from fastif_ext.samplers import LogitFold
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> data = DataLoader(TensorDataset(torch.randn(90, 4)), batch_size=32)
        >>> model = torch.nn.Linear(4, 3)
        >>> fi.distributed.sample(LogitFold(5, seed=0), model, data, progress=False)
        LogitSampler(15 of 90 rows)
        >>> dist.destroy_process_group()
    """
    ranks = opened(group)
    ranks.meet("sample", sampler=fold.name, **fold.arguments)
    part = enter("sample", ranks, model, loader, layer)
    empty = copy.deepcopy(fold)
    with ranks.telling("sample"):
        for batch in stream(
            model,
            loader,
            layer=layer,
            device=device,
            progress=progress and ranks.rank == 0,
            first_batch=part.batches.start,
            stop_batch=part.batches.stop,
            first_row=part.rows.start,
        ):
            fold.update(batch)
        if fold.rows != len(part.rows):
            raise ValueError(
                f"sample: the model gave {fold.rows} rows for the {len(part.rows)} that the loader "
                f"tells of; where rows are tokens, its batches must hold labels [batch, T]"
            )
        packed = _pack(fold)
    lengths = ranks.meet("sample: states", len(packed))
    whole = ranks.gather_rows("sample: states", packed, to=0)
    del packed
    drawn: list[Tensor | None] = [None, None]
    n = part.n
    with ranks.telling("sample"):
        if whole is not None:  # on rank 0
            first, *others = whole.split(lengths)
            total = _unpacked(empty, first)
            for state in others:
                total.merge(_unpacked(empty, state))
            del whole
            n, *drawn = total.subset()
    rows, weights = (_shared(ranks, t) for t in drawn)
    return fold.sampler.drawn(n, rows, weights)


def _pack(fold: Fold) -> Tensor:
    """The fold's state as bytes."""
    buffer = io.BytesIO()
    torch.save(fold.state_dict(), buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def _unpacked(like: Fold, packed: Tensor) -> Fold:
    """A fold of the same kind and arguments in the state that was packed."""
    fold = copy.deepcopy(like)
    fold.load_state_dict(torch.load(io.BytesIO(packed.numpy().tobytes()), weights_only=True))
    return fold


def _shared(ranks: Ranks, t: Tensor | None) -> Any:
    """Rank 0's tensor, or None, on all ranks."""
    place = empty(ranks.meet("sample: drawn", kind(t))[0])
    if place is None:
        return None
    if t is not None:
        place.copy_(t)
    ranks.broadcast_("sample: drawn", [place])
    return place
