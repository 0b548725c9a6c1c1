"""A sampler from a loader: its fold, driven over one pass of the model."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from fastif_ext import fingerprint
from fastif_ext.samplers.checkpoint import Checkpoint
from fastif_ext.samplers.fold import Fold
from fastif_ext.stream import Layer, stream


def drive(
    fold: Fold,
    model: nn.Module | None,
    loader: DataLoader[Any],
    *,
    layer: Layer = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    state: str | os.PathLike[str] | None = None,
) -> Any:
    """The sampler of all rows of the loader, of which no more than a batch is in memory.

    With `state` the pass can be interrupted, by Ctrl-C, an error or a kill, and goes on when it is
    called again in the same way: what is in the file is not read or computed again (an iterable
    dataset is read from its beginning, but the model is not run), and the result is the same, bit
    for bit. The file is written every 30 seconds, more rarely where that would take more than 5 %
    of the time, and when the pass is interrupted. It is removed when the sampler is drawn.

    Args:
        fold: a new fold.
        model: None where the fold needs no logits; then no model is run.
        loader: a DataLoader that does not shuffle.
        layer: where features come from, as in fastif_ext.extract.
        device: where the model runs.
        progress: show a progress bar.
        state: a file. It may be there from an earlier call, and is refused where sampler,
            arguments, model, layer, number of rows or the first batch are others now: a dataset
            that changes its rows at random cannot go on.

    Returns:
        fold.finish().

    Raises:
        ValueError: the file is of something else; what stream, Fold.update and Fold.finish raise.
    """
    if state is None:
        for batch in stream(model, loader, layer=layer, device=device, progress=progress):
            fold.update(batch)
        return fold.finish()
    made_of = {
        "model": None if model is None else fingerprint.of_model(model),
        "layer": fingerprint.of_layer(layer),
        "data": fingerprint.of_data(loader),
    }
    checkpoint = Checkpoint(state, fold, made_of)
    checkpoint.read_on(
        model, loader, first_row=fold.rows, layer=layer, device=device, progress=progress
    )
    sampler = fold.finish()
    checkpoint.remove()
    return sampler
