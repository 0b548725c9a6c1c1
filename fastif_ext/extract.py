"""One pass of a model over a DataLoader: logits, features, labels, in memory or on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext import store as stores
from fastif_ext.stream import ExtractedBatch, Layer, stream

__all__ = ["Extracted", "ExtractedBatch", "Layer", "extract", "open_store", "stream"]


class Extracted(NamedTuple):
    """What one pass over n rows gave, on the CPU, in the loader's order.

    From a store the tensors lie in files mapped into memory and are read as they are used. They
    cannot be written in: an operation in place ends the process.
    """

    logits: Tensor
    """[n, Y], the model's dtype."""
    features: Tensor | None
    """[n, d], flattened per row; None where no layer was asked for."""
    labels: Tensor | None
    """int64 [n]; None where the batches hold no labels."""


def extract(
    model: nn.Module,
    loader: DataLoader[Any],
    *,
    layer: Layer = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    store: str | os.PathLike[str] | None = None,
) -> Extracted:
    """Run the model once over the loader and keep its logits, features and labels.

    The model runs in eval mode without gradients and is left as it was found.

    Args:
        model: maps a batch's inputs to logits [b, Y] (a tensor, or an object with ``.logits``), or
            to logits [b, T, Y] of tokens, which then are the rows (see fastif_ext.TokenRows).
        loader: batches ``(inputs, labels)``, ``inputs`` alone, or a dict with an optional key
            ``labels`` or ``label``. It must not shuffle: rows are numbered as in the dataset.
        layer: where features come from. ``"penultimate"``: the input of the model's last nn.Linear;
            another string: the output of the submodule of that name; a callable: any other
            network, applied to the inputs (extrinsic features); None: no features.
        device: where the model runs; by default the device of its first parameter.
        progress: show a progress bar.
        store: a folder to keep it in, for what is larger than memory or is used again. An empty or
            new folder is filled, where a pass was interrupted it goes on, and one that is complete
            is opened without running the model.

    Returns:
        Extracted(logits [n, Y], features [n, d] or None, labels int64 [n] or None), on the CPU.

    Raises:
        ValueError: a shuffling loader, an empty one, an unknown layer, logits of another shape, a
            store of another model, layer or data, or a folder with other files.
        TypeError: a dataset in place of a loader.

    Example:
        >>> import torch, fastif_ext as fi
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> data = TensorDataset(torch.randn(10, 4), torch.arange(10) % 3)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3))
        >>> got = fi.extract(model, DataLoader(data, 4), layer="penultimate", progress=False)
        >>> got.logits.shape, got.features.shape, got.labels.shape
        (torch.Size([10, 3]), torch.Size([10, 5]), torch.Size([10]))
    """
    if store is not None:
        writer = stores.Writer(Path(store), model, loader, layer)
        if not writer.complete:
            options: dict[str, Any] = {"layer": layer, "device": device, "progress": progress}
            writer.read_on(model, loader, first_row=writer.rows, **options)
            writer.finish()
        return open_store(store)
    read = [
        batch._replace(
            logits=batch.logits.cpu(),
            features=None if batch.features is None else batch.features.cpu(),
        )
        for batch in stream(model, loader, layer=layer, device=device, progress=progress)
    ]
    if not read:
        raise ValueError("extract: loader gave no batch; it needs at least one row")
    features = [b.features for b in read if b.features is not None]
    labels = [b.labels for b in read if b.labels is not None]
    if labels and len(labels) < len(read):
        raise ValueError("extract: some batches have labels and others have none; all or none must")
    return Extracted(
        torch.cat([b.logits for b in read]),
        torch.cat(features) if features else None,
        torch.cat(labels) if labels else None,
    )


def open_store(folder: str | os.PathLike[str]) -> Extracted:
    """What ``extract(..., store=folder)`` has kept, whatever model and data it is of.

    Args:
        folder: a complete store.

    Returns:
        Extracted, of tensors in files mapped into memory.

    Raises:
        ValueError: the folder is no store, not complete, or damaged.

    Example:
        >>> import tempfile, torch, fastif_ext as fi
        >>> from torch.utils.data import DataLoader
        >>> model, loader = torch.nn.Linear(4, 3), DataLoader(torch.randn(10, 4), 5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = fi.extract(model, loader, store=folder, progress=False)
        ...     fi.open_store(folder).logits.shape
        torch.Size([10, 3])
    """
    arrays = stores.read(Path(folder))
    return Extracted(arrays["logits"], arrays.get("features"), arrays.get("labels"))
