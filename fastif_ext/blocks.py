"""The rows of a matrix in blocks of fixed size: of a tensor, an array or chunks from a disk."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastif_ext.data import split_batch
from fastif_ext.loaders import check_loader, start
from fastif_ext.ops._check import check_tensor

BLOCK = 2**26  # numbers in a block: 256 MB of float32
Matrix = Tensor | np.ndarray | Iterable[Any]


def as_tensor(x: Any) -> Any:
    """An array as a tensor that shares its memory, read-only or not; anything else as it is."""
    if not isinstance(x, np.ndarray):
        return x
    with warnings.catch_warnings():  # of arrays that cannot be written in: nothing here writes
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(x)


class Blocks:
    """The rows of a matrix, some at a time.

    However the matrix is cut into chunks, the blocks are the same: sums taken block by block are
    the same bits for chunks from a disk as for one tensor in memory. A tensor, or an array mapped
    from a file, is not copied. Chunks are read once here, to be counted and checked, and once in
    every iteration over the blocks.

    Args:
        op: the caller, for messages.
        x: a tensor or array [n, d], or an iterable that gives the same chunks [any, d] every time:
            a list, a DataLoader that does not shuffle, an object with ``__iter__``.

    Raises:
        TypeError: not a matrix, or an iterator, which could be read only once.
        ValueError: NaN or inf in a row, chunks that do not fit together.

    Example:
        >>> import torch
        >>> from fastif_ext.blocks import Blocks
        >>> blocks = Blocks("demo", [torch.zeros(2, 3), torch.ones(4, 3)])
        >>> blocks.rows, [(rows, tuple(x.shape)) for rows, x in blocks]
        (6, [(slice(0, 6, None), (6, 3))])
    """

    def __init__(self, op: str, x: Matrix) -> None:
        self._op = op
        self._chunks: Iterable[Any] = [x] if isinstance(x, (Tensor, np.ndarray)) else x
        if not isinstance(self._chunks, Iterable):
            check_tensor(op, "x", self._chunks, dims=(2,))  # says what x must be
        if isinstance(self._chunks, DataLoader):
            check_loader(self._chunks)
        if isinstance(self._chunks, Iterator):
            raise TypeError(
                f"{op}: x is a {type(x).__name__}, which can be read only once, and several passes "
                f"are needed; pass a list, a DataLoader or an object whose __iter__ begins anew"
            )
        self.rows = 0
        like: Tensor | None = None
        for chunk in self._read():
            if like is None:
                like = chunk[:0]
            if (chunk.shape[1:], chunk.dtype, chunk.device) != (
                (like.shape[1:], like.dtype, like.device)
            ):
                raise ValueError(
                    f"{op}: the chunk at row {self.rows} is {list(chunk.shape)} {chunk.dtype} on "
                    f"{chunk.device}, the first has {like.shape[1]} columns of {like.dtype} on "
                    f"{like.device}; all must be alike"
                )
            if chunk.numel():
                self._check_values(chunk)
            self.rows += len(chunk)
        if like is None:
            raise ValueError(f"{op}: x gave no chunk; it needs at least one row")
        self.columns = like.shape[1]
        self.device = like.device
        self.dtype = like.dtype
        self._like = like
        self.size = max(BLOCK // max(self.columns, 1), 1)
        """Rows of a block; the last one may have fewer."""

    def _check_values(self, chunk: Tensor) -> None:
        """Finite, and so are squared distances."""
        largest = float(torch.stack(torch.aminmax(chunk)).abs().double().max())
        if not math.isfinite(largest):
            row = self.rows + int((~chunk.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"{self._op}: row {row} of x has NaN or inf; remove such rows")
        kept = torch.promote_types(chunk.dtype, torch.float32)
        if 2 * largest * math.sqrt(chunk.shape[1]) >= math.sqrt(torch.finfo(kept).max):
            raise ValueError(
                f"{self._op}: x has values up to {largest:.3g}, whose squared distances overflow "
                f"{str(kept).removeprefix('torch.')}; divide x by a constant"
            )

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """The blocks: which rows, and the rows."""
        held: list[Tensor] = []
        first = seen = have = 0
        for whole in self._read():
            seen += len(whole)
            chunk = whole
            while have + len(chunk) >= self.size:
                need = self.size - have
                yield slice(first, first + self.size), joined([*held, chunk[:need]])
                first += self.size
                held, have, chunk = [], 0, chunk[need:]
            if len(chunk):
                held.append(chunk)
                have += len(chunk)
        if seen != self.rows:
            raise ValueError(
                f"{self._op}: x gave {self.rows} rows at first and {seen} later; it must give the "
                f"same every time"
            )
        if have or not first:
            yield slice(first, first + have), joined(held or [self._like])

    def take(self, rows: Tensor) -> Tensor:
        """The rows of these numbers, in this order: one pass."""
        rows = rows.cpu()
        taken = self._like.new_empty(len(rows), self.columns)
        first = 0
        for chunk in self._read():
            here = ((rows >= first) & (rows < first + len(chunk))).nonzero()[:, 0]
            taken[here.to(self.device)] = chunk[(rows[here] - first).to(self.device)]
            first += len(chunk)
        return taken

    def _read(self) -> Iterator[Tensor]:
        for batch in start(self._chunks):
            chunk = as_tensor(split_batch(batch)[0])
            check_tensor(self._op, "x", chunk, dims=(2,))
            yield chunk


def joined(parts: list[Tensor]) -> Tensor:
    """The rows of the parts one behind the other; one part alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
