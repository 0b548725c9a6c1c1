"""Batches of whatever a user's data comes in: tensors, a Dataset, a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

BATCH = 1024

Rows = tuple[Any, Tensor] | Dataset[Any]
Data = Rows | DataLoader[Any]


def split_batch(batch: Any) -> tuple[Any, Any]:
    """(inputs, labels) of a batch; labels is None where the batch has none."""
    if isinstance(batch, Mapping):
        for key in ("labels", "label"):
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, batch[key]
        return batch, None
    if isinstance(batch, (tuple, list)):
        if len(batch) == 1:
            return batch[0], None
        if len(batch) == 2:
            return batch[0], batch[1]
        raise ValueError(
            f"a batch must be (inputs, labels), inputs alone or a dict, got a "
            f"{type(batch).__name__} of {len(batch)}; use a collate_fn that returns one of these"
        )
    return batch, None


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """model(inputs), or model(**inputs) for a dict."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def tree_map(f: Callable[[Tensor], Tensor], value: Any) -> Any:
    """F applied to a tensor, or to every tensor of a dict or sequence."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, Mapping):
        return {k: tree_map(f, v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [tree_map(f, v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a nested value, in order."""
    found: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        found.append(t)
        return t

    tree_map(note, value)
    return found


def cut(value: Any, rows: slice | Tensor) -> Any:
    """The rows of a tensor, or of every tensor of a dict or sequence, wherever `rows` is."""
    if isinstance(rows, slice):
        return tree_map(lambda t: t[rows], value)
    return tree_map(lambda t: t[rows.to(t.device)], value)


def to_device(inputs: Any, device: torch.device | str) -> Any:
    """A tensor, or a dict or sequence of tensors, moved to the device.

    From pinned memory to a GPU nothing waits. To the CPU it must: the data is read at once.
    """
    free = torch.device(device).type != "cpu"
    return tree_map(lambda t: t.to(device, non_blocking=free), inputs)


def batch_rows(inputs: Any) -> int:
    """Number of examples in a batch of inputs."""
    if isinstance(inputs, Tensor):
        return len(inputs)
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return batch_rows(next(iter(values)))


def loader(data: Dataset[Any], batch_size: int = BATCH) -> DataLoader[Any]:
    """Batches of a dataset in its order; a TensorDataset is sliced, not collated row by row."""
    generator = torch.Generator()  # a DataLoader draws a seed: not from torch's global generator
    if type(data) is TensorDataset:  # a subclass may have a __getitem__ of its own
        slices = [slice(i, i + batch_size) for i in range(0, len(data), batch_size)]
        return DataLoader(data, batch_size=None, sampler=slices, generator=generator)
    return DataLoader(data, batch_size=batch_size, generator=generator)


def batches(data: Data, batch_size: int = BATCH) -> Iterator[tuple[Any, Any]]:
    """(inputs, targets) batches: of a DataLoader as it gives them, of the rest in order."""
    if isinstance(data, DataLoader):
        yield from map(split_batch, data)
    elif isinstance(data, tuple):
        if len(data) != 2:
            raise ValueError(f"data must be (inputs, targets), got a tuple of {len(data)}")
        inputs, targets = data
        _check_lengths("data", inputs, targets)
        for i in range(0, len(targets), batch_size):
            part = slice(i, i + batch_size)
            yield cut(inputs, part), targets[part]
    elif isinstance(data, Dataset) or has_rows(data):
        yield from map(split_batch, loader(data, batch_size))
    else:
        raise TypeError(
            f"data must be (inputs, targets), a Dataset or a DataLoader, got {type(data).__name__}"
        )


def _check_lengths(name: str, inputs: Any, targets: Tensor) -> None:
    if batch_rows(inputs) != len(targets):
        raise ValueError(
            f"{name} has {batch_rows(inputs)} inputs and {len(targets)} targets; they must match"
        )


def merged(source: Iterable[tuple[Any, Any]], rows: int) -> Iterator[tuple[Any, Any]]:
    """Consecutive batches of equal shape put together, up to `rows` rows: fewer, faster passes."""
    group: list[tuple[Any, Any]] = []
    total = 0
    for batch in source:
        n = batch_rows(batch[0])
        if group and (total + n > rows or _kind(batch) != _kind(group[0]) or not _kind(batch)):
            yield _concatenate(group)
            group, total = [], 0
        group.append(batch)
        total += n
    if group:
        yield _concatenate(group)


def _kind(batch: tuple[Any, Any]) -> list[tuple[Any, ...]]:
    """What must agree to concatenate two batches; empty where a tensor is not one row each."""
    tensors = tensors_of(batch)
    n = batch_rows(batch[0])
    if any(t.dim() == 0 or len(t) != n for t in tensors):
        return []
    return [(t.shape[1:], t.dtype, t.device) for t in tensors]


def _concatenate(group: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    if len(group) == 1:
        return group[0]
    whole = iter([torch.cat(parts) for parts in zip(*map(tensors_of, group), strict=True)])
    inputs, targets = tree_map(lambda t: next(whole), group[0])
    return inputs, targets


def take(data: Rows, rows: Tensor) -> Any:
    """The rows of tensors or of a map-style dataset, in that order, repeats included."""
    if type(data) is TensorDataset:
        return TensorDataset(*cut(data.tensors, rows))
    if isinstance(data, tuple):
        targets = data[1]
        at = rows.to(targets.device) if isinstance(targets, Tensor) else rows.cpu()
        return cut(data[0], rows), targets[at]
    return Subset(data, rows.tolist())


class _Relabelled(Dataset[Any]):
    """A data set of (inputs, label) with some labels replaced."""

    def __init__(self, data: Dataset[Any], labels: dict[int, int]) -> None:
        self.data, self.labels = data, labels

    def __len__(self) -> int:
        return count(self.data)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        inputs, label = self.data[i]
        return inputs, self.labels.get(int(i), label)


def relabelled(data: Dataset[Any], rows: Tensor, labels: Tensor) -> Dataset[Any]:
    """The data set of (inputs, label) with other labels in some rows; the original stays."""
    if type(data) is TensorDataset:
        inputs, old = data.tensors
        new = old.clone()
        new[rows.to(old.device)] = labels.to(old)
        return TensorDataset(inputs, new)
    return _Relabelled(data, dict(zip(rows.tolist(), labels.tolist(), strict=True)))


class _Pairs(Dataset[Any]):
    """(inputs, targets), whole, as a data set of rows."""

    def __init__(self, inputs: Any, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Any, Tensor]:
        return tree_map(lambda t: t[i], self.inputs), self.targets[i]


def has_rows(data: Any) -> bool:
    """Whether any row can be read: a map-style Dataset, or what behaves like one."""
    if isinstance(data, (Tensor, Mapping, str, tuple, IterableDataset)):
        return False
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


def map_style(name: str, data: Rows) -> Dataset[Any]:
    """A data set of which any row can be read: a Dataset as it is, (inputs, targets) as one.

    Raises:
        TypeError: a DataLoader, an IterableDataset, anything else; the message begins with `name`.
        ValueError: inputs and targets of different lengths.
    """
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor):
        inputs, targets = data
        _check_lengths(name, inputs, targets)
        return TensorDataset(inputs, targets) if isinstance(inputs, Tensor) else _Pairs(*data)
    if not has_rows(data):
        remedy = "; pass its .dataset" if isinstance(data, DataLoader) else ""
        raise TypeError(
            f"{name} must be a map-style Dataset or (inputs, targets), of which any row can be "
            f"read, got a {type(data).__name__}{remedy}"
        )
    return data


def count(data: Rows) -> int:
    """Number of rows of tensors or of a map-style dataset."""
    if isinstance(data, tuple):
        return len(data[1])
    if not hasattr(data, "__len__"):
        raise TypeError(
            f"a {type(data).__name__} has no length; pass (inputs, targets) or a map-style Dataset"
        )
    return len(data)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter; the CPU where it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode; restore each module's own flag afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
