"""What all samplers share: the subset they hold, and the checks of their arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler


class SubsetSampler(Sampler[int]):
    """What all samplers here are: ``m`` of ``n`` rows, with a weight each.

    ``indices``, int64 [m], and ``weights``, float32 [m], are on the CPU, where data sets and
    DataLoaders want them, whatever device they were drawn on.
    """

    indices: Tensor
    weights: Tensor

    def __init__(self, n: int, indices: Tensor, weights: Tensor | None = None) -> None:
        self.n = n
        self.indices = indices.cpu()
        m = len(indices)
        self.weights = (
            torch.full((m,), 1 / m, dtype=torch.float32)
            if weights is None
            else weights.cpu().float()
        )

    @classmethod
    def drawn(cls, n: int, indices: Tensor, weights: Tensor | None = None) -> Any:
        """A sampler of this class with a subset that is drawn already."""
        sampler = cls.__new__(cls)
        SubsetSampler.__init__(sampler, n, indices, weights)
        return sampler

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices.tolist())

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} of {self.n} rows)"


def generator(seed: int) -> torch.Generator:
    """A generator of its own, so that torch's global one is not touched."""
    return torch.Generator().manual_seed(seed)


def check_size(sampler: str, n: int, m: int) -> None:
    """Require 1 <= m <= n."""
    if not isinstance(m, int) or isinstance(m, bool):
        raise TypeError(f"{sampler}: m must be an int, got {type(m).__name__}")
    if not 1 <= m <= n:
        raise ValueError(f"{sampler}: m must be between 1 and the {n} rows given, got {m}")


def check_logits(sampler: str, logits: Tensor, *, first_row: int = 0) -> Tensor:
    """The logits, detached; they must be [n, Y] without NaN or +inf."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point():
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{sampler}: logits must be a floating-point tensor [n, Y], got {got}")
    logits = logits.detach()
    # The largest logit of a row shows both, and no n x Y tensor is made.
    bad = (~(logits.amax(1) < torch.inf)).nonzero().flatten() if logits.numel() else None
    if bad is not None and len(bad):
        raise ValueError(
            f"{sampler}: logits hold NaN or +inf in {len(bad)} rows, the first is row "
            f"{first_row + int(bad[0])}; remove these rows or mend the model"
        )
    return logits


def check_labels(
    sampler: str, labels: Tensor, *, n: int | None = None, classes: int | None = None
) -> Tensor:
    """The labels as int64 [n], within [0, classes)."""
    labels = torch.as_tensor(labels).detach().cpu()
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{sampler}: labels must be integers, got {labels.dtype}; use .long()")
    if labels.dim() != 1 or (n is not None and len(labels) != n):
        wanted = "[n]" if n is None else f"[{n}], one per row of logits"
        raise ValueError(f"{sampler}: labels must have shape {wanted}, got {list(labels.shape)}")
    labels = labels.long()
    if classes is not None and len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"{sampler}: labels must be between 0 and {classes - 1}, the columns of logits; got "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    return labels


def require_labels(sampler: str, labels: Tensor | None) -> Tensor:
    """The labels of a batch, which must have some."""
    if labels is None:
        raise ValueError(f"{sampler}: labels are needed, but the loader's batches hold none")
    return labels


def row_blocks(logits: Tensor, elements: int = 2**22) -> Iterator[slice]:
    """Slices of rows with so many logits at most: what is made of one block stays small."""
    n, classes = logits.shape
    step = max(elements // max(classes, 1), 1)
    return (slice(i, min(i + step, n)) for i in range(0, n, step))
