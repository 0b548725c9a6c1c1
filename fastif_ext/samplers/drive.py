"""A sampler from a loader: its fold, driven over one pass of the model."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from fastif_ext.extract import Layer, stream
from fastif_ext.samplers.fold import Fold


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

    Args:
        fold: a new fold.
        model: None where the fold needs no logits; then no model is run.
        loader: a DataLoader that does not shuffle.
        layer: where features come from, as in fastif_ext.extract.
        device: where the model runs.
        progress: show a progress bar.
        state: a file.

    Returns:
        fold.finish().
    """
    for batch in stream(model, loader, layer=layer, device=device, progress=progress):
        fold.update(batch)
    return fold.finish()
