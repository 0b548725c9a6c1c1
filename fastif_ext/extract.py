"""One pass of a model over a DataLoader: logits, features, labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from fastif_ext.data import (
    batch_rows,
    call,
    device_of,
    evaluating,
    split_batch,
    to_device,
)
from fastif_ext.device import memory_for
from fastif_ext.loaders import batch_count, batch_range, refuse_shuffling, start

Layer = str | Callable[[Any], Tensor] | None


class Extracted(NamedTuple):
    """What one pass over n rows gave, on the CPU, in the loader's order."""

    logits: Tensor
    """[n, Y], the model's dtype."""
    features: Tensor | None
    """[n, d], flattened per row; None where no layer was asked for."""
    labels: Tensor | None
    """int64 [n]; None where the batches hold no labels."""


class ExtractedBatch(NamedTuple):
    """The same for one batch, where the model ran (labels: on the CPU), and its first row."""

    row_offset: int
    logits: Tensor
    features: Tensor | None
    labels: Tensor | None


def extract(
    model: nn.Module,
    loader: DataLoader[Any],
    *,
    layer: Layer = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Extracted:
    """Run the model once over the loader and keep its logits, features and labels.

    The model runs in eval mode without gradients and is left as it was found.

    Args:
        model: maps a batch's inputs to logits [b, Y] (a tensor, or an object with ``.logits``).
        loader: batches ``(inputs, labels)``, ``inputs`` alone, or a dict with an optional key
            ``labels`` or ``label``. It must not shuffle: rows are numbered as in the dataset.
        layer: where features come from. ``"penultimate"``: the input of the model's last nn.Linear;
            another string: the output of the submodule of that name; a callable: any other
            network, applied to the inputs (extrinsic features); None: no features.
        device: where the model runs; by default the device of its first parameter.
        progress: show a progress bar.

    Returns:
        Extracted(logits [n, Y], features [n, d] or None, labels int64 [n] or None), on the CPU.

    Raises:
        ValueError: a shuffling loader, an empty one, an unknown layer, logits that are not 2-D.

    Example:
        >>> import torch, fastif_ext as fi
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> data = TensorDataset(torch.randn(10, 4), torch.arange(10) % 3)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3))
        >>> got = fi.extract(model, DataLoader(data, 4), layer="penultimate", progress=False)
        >>> got.logits.shape, got.features.shape, got.labels.shape
        (torch.Size([10, 3]), torch.Size([10, 5]), torch.Size([10]))
    """
    batches = [
        batch._replace(
            logits=batch.logits.cpu(),
            features=None if batch.features is None else batch.features.cpu(),
        )
        for batch in stream(model, loader, layer=layer, device=device, progress=progress)
    ]
    if not batches:
        raise ValueError("extract: loader gave no batch; it needs at least one row")
    features = [b.features for b in batches if b.features is not None]
    labels = [b.labels for b in batches if b.labels is not None]
    return Extracted(
        torch.cat([b.logits for b in batches]),
        torch.cat(features) if features else None,
        torch.cat(labels) if labels else None,
    )


def stream(
    model: nn.Module | None,
    loader: DataLoader[Any],
    *,
    layer: Layer = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    first_batch: int = 0,
    stop_batch: int | None = None,
    first_row: int = 0,
) -> Iterator[ExtractedBatch]:
    """The same pass, batch by batch, for what needs no more than one batch in memory.

    Args:
        model: as for extract; None where logits are not needed: they are [b, 0] then.
        loader: as for extract.
        layer: as for extract.
        device: as for extract.
        progress: show a progress bar.
        first_batch: begin at this batch of the loader. Of a map-style dataset those before it are
            not loaded, of an iterable one they are read and dropped.
        stop_batch: end before this batch.
        first_row: number of the first row of the first batch.
    """
    refuse_shuffling(loader)
    if model is None:
        yield from _labels(loader, first_batch, stop_batch, first_row, progress)
        return
    device = device_of(model) if device is None else device
    network, name = (layer, None) if not isinstance(layer, str) else (None, layer)
    row_offset = first_row
    with evaluating(model), _capture(model, name) as captured:
        for batch in _read(loader, first_batch, stop_batch, progress):
            inputs, labels = split_batch(batch)
            rows = batch_rows(inputs)
            with (
                memory_for(f"a batch of {rows} rows", "use a loader with a smaller batch_size"),
                torch.no_grad(),
            ):
                inputs = to_device(inputs, device)
                output = call(model, inputs)
                features = captured.pop() if name is not None else None
                if network is not None:
                    features = network(inputs)
            logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
            if not isinstance(logits, Tensor) or logits.dim() != 2:
                got = list(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
                raise ValueError(f"extract: the model must return logits [batch, Y], got {got}")
            yield ExtractedBatch(
                row_offset,
                logits.detach(),
                None if features is None else features.detach().flatten(1),
                None if labels is None else torch.as_tensor(labels).cpu().long(),
            )
            row_offset += logits.shape[0]


def _labels(
    loader: DataLoader[Any], first: int, stop: int | None, row: int, progress: bool
) -> Iterator[ExtractedBatch]:
    """The pass without a model."""
    for batch in _read(loader, first, stop, progress):
        inputs, labels = split_batch(batch)
        labels = None if labels is None else torch.as_tensor(labels).cpu().long()
        yield ExtractedBatch(row, torch.empty(batch_rows(inputs), 0), None, labels)
        row += batch_rows(inputs)


def _read(loader: DataLoader[Any], first: int, stop: int | None, progress: bool) -> Iterator[Any]:
    """The batches first <= i < stop of the loader, behind a progress bar."""
    iterator = start(batch_range(loader, first, stop))
    size = batch_count(loader)
    total = size if stop is None or size is None else min(stop, size)
    yield from tqdm(iterator, "logits", total, unit="batch", initial=first, disable=not progress)


@contextmanager
def _capture(model: nn.Module, name: str | None) -> Iterator[list[Tensor]]:
    """A list that receives the named layer's features at every forward pass."""
    captured: list[Tensor] = []
    if name is None:
        yield captured
        return

    def keep(value: Any) -> None:
        if not isinstance(value, Tensor):
            raise ValueError(
                f"extract: layer {name!r} gives a {type(value).__name__}, not a tensor"
            )
        captured[:] = [value]

    if name == "penultimate":
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise ValueError(
                "extract: layer='penultimate' is the input of the last nn.Linear, and the model "
                "has none; name a submodule instead"
            )
        handle = linear[-1].register_forward_pre_hook(lambda module, args: keep(args[0]))
    else:
        modules = dict(model.named_modules())
        if name not in modules:
            known = ", ".join(n for n in modules if n)
            raise ValueError(f"extract: the model has no submodule {name!r}; it has: {known}")
        handle = modules[name].register_forward_hook(lambda module, args, output: keep(output))
    try:
        yield captured
    finally:
        handle.remove()
