"""What tells whether work on disk belongs to a model and to data: digests of their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext.loaders import batch_count, batch_range, start
from fastif_ext.stream import Layer


def of_model(model: nn.Module) -> str:
    """A digest of the modules, as they print, and of every byte of parameters and buffers.

    It takes about a second per gigabyte, and no memory but that of the largest tensor on a GPU.

    Example:
        >>> import torch
        >>> from fastif_ext import fingerprint
        >>> model = torch.nn.Linear(2, 1)
        >>> before = fingerprint.of_model(model)
        >>> _ = model.bias.data.add_(1e-3)
        >>> before == fingerprint.of_model(model)
        False
    """
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(name.encode())
        _feed(digest, tensor)
    return digest.hexdigest()[:32]


def of_layer(layer: Layer) -> str | None:
    """The name of a layer, the digest of a network, or the name of another callable.

    Of a method or a partial, what it is bound to is part of it.
    """
    if layer is None or isinstance(layer, str):
        return layer
    if isinstance(layer, nn.Module):
        return of_model(layer)
    if isinstance(layer, partial):
        digest = hashlib.sha256(str(of_layer(layer.func)).encode())
        for value in (*layer.args, *layer.keywords.values()):
            digest.update(of_model(value).encode() if isinstance(value, nn.Module) else b"")
            _feed(digest, value)
        return digest.hexdigest()[:32]
    owner = getattr(layer, "__self__", None)
    if isinstance(owner, nn.Module):
        return f"{layer.__qualname__} of {of_model(owner)}"
    return f"{layer.__module__}.{getattr(layer, '__qualname__', type(layer).__qualname__)}"


def of_data(loader: DataLoader[Any]) -> dict[str, Any]:
    """The number of rows and batches, where they are known, and a digest of the first batch.

    The first batch is read for it. Data that differs behind it, in as many rows, is not told apart.

    Raises:
        TypeError: an iterator, whose first batch would be lost.
    """
    if isinstance(loader, Iterator):
        raise TypeError(
            f"store= and state= need a loader that can be read again, got a "
            f"{type(loader).__name__}; pass a DataLoader or an object whose __iter__ begins anew"
        )
    try:
        rows = len(loader.dataset)  # type: ignore[arg-type]
    except (AttributeError, TypeError, NotImplementedError):
        rows = None
    digest = hashlib.sha256()
    with torch.random.fork_rng(devices=[]):  # reading may draw random numbers
        for batch in start(batch_range(loader, 0, 1)):
            _feed(digest, batch)
    return {"rows": rows, "batches": batch_count(loader), "first batch": digest.hexdigest()[:32]}


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The first thing in which two descriptions differ, in words; None where there is none."""
    for key in dict.fromkeys((*here, *there)):
        a, b = there.get(key), here.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            inner = difference(a, b)
            if inner is not None:
                return f"{key}: {inner}"
        elif a != b:
            return f"{key} is {a!r} there and {b!r} here"
    return None


def require_same(what: str, path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Require that what lies at `path` was made of the same things.

    Raises:
        ValueError: it was not; the message says in what they differ.
    """
    differs = difference(there, here)
    if differs is not None:
        raise ValueError(
            f"{what} in {path} does not match: {differs}. Pass what it was made with, or delete it "
            f"to begin anew"
        )


def _feed(digest: Any, value: Any) -> None:
    """Every byte of a nest of tensors; of other objects what they print, or their type."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(str(key).encode())
            _feed(digest, item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _feed(digest, item)
    elif isinstance(value, (str, bytes, bool, int, float)):
        digest.update(repr(value).encode())
    else:
        digest.update(type(value).__qualname__.encode())
