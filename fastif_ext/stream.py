"""One pass of a model over a DataLoader, batch by batch; tokens are rows."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
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
from fastif_ext.loaders import batch_count, batch_range, check_loader, start
from fastif_ext.memory import reuse_freed_memory

Layer = str | Callable[[Any], Tensor] | None
IGNORED = -100  # the label of a token that has none, as in torch's cross_entropy


class ExtractedBatch(NamedTuple):
    """The same for one batch, where the model ran (labels: on the CPU), and its first row."""

    row_offset: int
    logits: Tensor
    features: Tensor | None
    labels: Tensor | None


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
) -> Generator[ExtractedBatch, None, None]:
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

    Yields:
        ExtractedBatch. Where the model gives logits [b, T, Y], rows are tokens: those of a sequence
        follow one another, and with labels [b, T] tokens labelled -100 are left out and not
        counted, as in fastif_ext.TokenRows.

    Raises:
        ValueError: as extract does.
    """
    check_loader(loader)
    if model is None:
        yield from _labels(loader, first_batch, stop_batch, first_row, progress)
        return
    reuse_freed_memory()
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
            if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
                got = list(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
                raise ValueError(
                    f"extract: the model must return logits [batch, Y] or [batch, T, Y], got {got}"
                )
            logits = logits.detach()
            features = None if features is None else features.detach()
            labels = _classes(labels, len(logits))
            if logits.dim() == 3:
                logits, features, labels = _token_rows(logits, features, labels)
            elif features is not None:
                features = features.flatten(1)
            yield ExtractedBatch(row_offset, logits, features, labels)
            row_offset += len(logits)


def _classes(labels: Any, rows: int) -> Tensor | None:
    """Labels int64, on the CPU; None for targets that are no classes: real numbers."""
    if labels is None:
        return None
    labels = torch.as_tensor(labels).cpu()
    if labels.dim() == 0 or len(labels) != rows:
        raise ValueError(
            f"a batch of {rows} rows has labels of shape {list(labels.shape)}; each row needs one"
        )
    return None if labels.is_floating_point() else labels.long()


def _token_rows(
    logits: Tensor, features: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A row for each token, of those with a label where there are labels."""
    tokens = logits.shape[:2]
    if features is not None:
        if features.shape[:2] != tokens:
            raise ValueError(
                f"extract: logits are of tokens, {list(logits.shape)}, so layer must give features "
                f"[batch, T, ...] of the same tokens, got {list(features.shape)}"
            )
        features = features.flatten(0, 1).flatten(1)
    logits = logits.flatten(0, 1)
    if labels is None:
        return logits, features, None
    if labels.shape != tokens:
        raise ValueError(
            f"extract: logits are of tokens, [{tokens[0]}, {tokens[1]}, Y], so labels must be "
            f"[{tokens[0]}, {tokens[1]}], with {IGNORED} where a token has none; got "
            f"{list(labels.shape)}"
        )
    labels = labels.flatten()
    kept = labels != IGNORED
    if bool(kept.all()):  # no copy
        return logits, features, labels
    there = kept.to(logits.device)
    return logits[there], None if features is None else features[there], labels[kept]


def _labels(
    loader: DataLoader[Any], first: int, stop: int | None, row: int, progress: bool
) -> Iterator[ExtractedBatch]:
    """The pass without a model."""
    for batch in _read(loader, first, stop, progress):
        inputs, labels = split_batch(batch)
        labels = _classes(labels, batch_rows(inputs))
        if labels is not None and labels.dim() > 1:
            raise ValueError(
                f"labels have shape {list(labels.shape)}; without the model's logits they do not "
                f"tell whether rows are inputs or tokens. For tokens pass a loader over "
                f"fastif_ext.TokenRows, else one with labels [batch] or without labels"
            )
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
