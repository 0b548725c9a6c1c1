"""What ranks compare, in words that are the same in all processes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 1 << 20  # words of a tensor at a time: little memory beside it


def texts(facts: Mapping[str, object]) -> dict[str, str]:
    """Each value in at most 200 letters: tensors by their bits, objects by their names."""
    return {name: _text(value)[:200] for name, value in facts.items()}


def bits(t: Tensor) -> str:
    """A hash of a tensor's bits, made where it lies and read in one transfer.

    A sum of its words as integers, each times an odd number of its place: exact in any order.
    """
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(t.element_size(), torch.uint8)
    flat = t.detach().reshape(-1).view(words)
    odd = 2 * torch.arange(min(CHUNK, len(flat)), device=t.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=t.device)
    for chunk in flat.split(CHUNK):
        total = 1_000_003 * total + (chunk.long() * odd[: len(chunk)]).sum()
    return f"{int(total) % 2**64:016x}"


def model_bits(model: nn.Module) -> str:
    """A hash of names, shapes, dtypes and bits of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {_text(t)};".encode())
    return digest.hexdigest()[:16]


def kind(t: Tensor | None) -> list[Any] | None:
    """Shape and dtype of a tensor, for ranks that do not have it."""
    return None if t is None else [list(t.shape), str(t.dtype)]


def empty(like: list[Any] | None, *, rows: int | None = None) -> Tensor | None:
    """A tensor of that kind, not filled; with another number of rows where it is given."""
    if like is None:
        return None
    shape, dtype = like
    first = shape[:1] if rows is None else [rows]
    return torch.empty(*first, *shape[1:], dtype=getattr(torch, dtype.removeprefix("torch.")))


def _text(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} with bits {bits(value)}"
    if value is None or isinstance(value, (bool, int, float, str, list, tuple, torch.dtype)):
        return str(value)
    return str(getattr(value, "__name__", type(value).__name__))
