"""What a sampler remembers of the rows read so far: updated by batches, merged, saved, finished."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastif_ext.samplers.base import SubsetSampler
from fastif_ext.stream import ExtractedBatch

Argument = int | float | str | bool | list[int] | None
JOIN_BELOW = 2**22  # rows; longer parts of a column are not copied into longer ones


class Fold(ABC):
    """The state of a sampler that reads rows in order, a stretch of consecutive rows at a time.

    ``update(batch)`` takes the rows that follow, ``merge(other)`` another fold of the rows that
    follow, ``finish()`` gives the sampler. The same rows in the same batches give the same sampler,
    bit for bit, into however many folds they are cut, and it is the sampler that the constructor
    draws from all rows at once: the constructor is a fold of one batch.

    Attributes:
        sampler: the class of what comes out.
        arguments: its arguments, numbers and strings. Folds merge, and load a state, only where
            class and arguments are the same.
        first_row: number of the first row seen; None as long as there was none.
        rows: how many were seen.

    Example:
        >>> import torch, fastif_ext as fi
        >>> from fastif_ext.stream import ExtractedBatch
        >>> from fastif_ext.samplers.logit import LogitFold
        >>> z = torch.randn(100, 5)
        >>> head, tail = LogitFold(3, seed=0), LogitFold(3, seed=0)
        >>> head.update(ExtractedBatch(0, z[:60], None, None))
        >>> tail.update(ExtractedBatch(60, z[60:], None, None))
        >>> head.merge(tail)
        >>> head.finish().indices.equal(fi.LogitSampler(z, 3, seed=0).indices)
        True
    """

    sampler: type[SubsetSampler]

    def __init__(self, **arguments: Argument) -> None:
        self.arguments = arguments
        self.first_row: int | None = None
        self.rows = 0

    @property
    def name(self) -> str:
        """The sampler's name, for messages."""
        return self.sampler.__name__

    def update(self, batch: ExtractedBatch) -> None:
        """Take in the rows that follow.

        Raises:
            ValueError: not the rows that follow; logits, features or labels that the sampler cannot
                use. The state then is as it was.
        """
        self._check_follows(batch.row_offset)
        self._update(batch)
        self._count(batch.row_offset, len(batch.logits))

    def merge(self, other: Fold) -> None:
        """Take in a fold of the rows that follow; `other` is not used again.

        Raises:
            ValueError: other is of another sampler or other arguments, or of other rows.
        """
        self._check_same(type(other), other.arguments)
        if other.first_row is None:
            return
        self._check_follows(other.first_row)
        self._merge(other)
        self._count(other.first_row, other.rows)

    def state_dict(self) -> dict[str, Any]:
        """All of it as tensors on the CPU and plain values: torch.load(weights_only=True) reads it.

        Tensors may share memory with the fold: save or send them before the next update.
        """
        return {
            "sampler": self.name,
            "arguments": self.arguments,
            "first_row": self.first_row,
            "rows": self.rows,
            "state": self._state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a state in the place of this one.

        Raises:
            ValueError: the state is of another sampler or of other arguments.
        """
        if state["sampler"] != self.name:
            raise ValueError(f"{self.name}: the state is one of a {state['sampler']}")
        self._check_same(type(self), state["arguments"])
        self._load(state["state"])
        self.first_row, self.rows = state["first_row"], state["rows"]

    def finish(self) -> Any:
        """The sampler of all rows seen.

        Raises:
            ValueError: no rows, or too few for what is to be drawn.
        """
        return self.sampler.drawn(*self.subset())

    def subset(self) -> tuple[int, Tensor, Tensor | None]:
        """n, rows int64 [m] and their weights [m], None for 1/m each."""
        if self.first_row is None:
            raise ValueError(f"{self.name}: there was no row to read; at least one is needed")
        if self.first_row != 0:
            raise ValueError(
                f"{self.name}: the rows before row {self.first_row} are missing; merge into the "
                f"fold of the first rows"
            )
        rows, weights = self._draw()
        return self.rows, rows, weights

    @abstractmethod
    def _update(self, batch: ExtractedBatch) -> None:
        """Take in a batch; nothing has changed where it raises."""

    @abstractmethod
    def _merge(self, other: Any) -> None:
        """Take in the state of the same class."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """Tensors and plain values."""

    @abstractmethod
    def _load(self, state: dict[str, Any]) -> None:
        """Put a state in the place of this one."""

    @abstractmethod
    def _draw(self) -> tuple[Tensor, Tensor | None]:
        """Rows and weights; all of self.rows rows, numbered from 0, are in."""

    def _count(self, first: int, rows: int) -> None:
        if rows and self.first_row is None:
            self.first_row = first
        self.rows += rows

    def _check_follows(self, row: int) -> None:
        if self.first_row is not None and row != self.first_row + self.rows:
            raise ValueError(
                f"{self.name}: rows {self.first_row} to {self.first_row + self.rows - 1} are in, "
                f"so row {self.first_row + self.rows} must follow, got row {row}; merge in order"
            )

    def _check_same(self, kind: type, arguments: Mapping[str, Any]) -> None:
        if kind is not type(self):
            raise ValueError(f"{self.name}: cannot merge a {kind.__name__}")
        for key in self.arguments.keys() | arguments.keys():
            if self.arguments.get(key) != arguments.get(key):
                raise ValueError(
                    f"{self.name}: {key} is {self.arguments.get(key)!r} here and "
                    f"{arguments.get(key)!r} in the other state; they must be the same"
                )


class Column:
    """A tensor that grows at its end: few parts in memory, however small the batches."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def append(self, rows: Tensor) -> None:
        """Put rows behind those that are there."""
        if not len(rows):
            return
        self._parts.append(rows)
        # A part is joined with one before it that is no longer, like the carry of a counter: each
        # row is copied some log2(JOIN_BELOW) times.
        while len(self._parts) > 1 and len(self._parts[-2]) <= len(self._parts[-1]) < JOIN_BELOW:
            last = self._parts.pop()
            self._parts[-1] = torch.cat([self._parts[-1], last])

    def extend(self, other: Column) -> None:
        """Put the rows of another column behind those that are there."""
        self._parts.extend(other._parts)

    def tensor(self) -> Tensor:
        """All rows; an empty [0] where there were none."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0] if self._parts else torch.empty(0)

    def load(self, rows: Tensor) -> None:
        """Put these rows in the place of all."""
        self._parts = [rows] if len(rows) else []  # none has a dtype to be kept


class ColumnFold(Fold):
    """A fold that keeps a few numbers per row, in columns."""

    def __init__(self, columns: tuple[str, ...], **arguments: Argument) -> None:
        super().__init__(**arguments)
        self.columns = {name: Column() for name in columns}

    @abstractmethod
    def _rows(self, batch: ExtractedBatch) -> tuple[Tensor, ...]:
        """What is kept of a batch's rows, one tensor [b, ...] per column."""

    def _update(self, batch: ExtractedBatch) -> None:
        self._append(self._rows(batch))

    def _append(self, kept: tuple[Tensor, ...]) -> None:
        for column, rows in zip(self.columns.values(), kept, strict=True):
            column.append(rows)

    def _merge(self, other: Any) -> None:
        for name, column in self.columns.items():
            column.extend(other.columns[name])

    def _state(self) -> dict[str, Any]:
        return {name: column.tensor().cpu() for name, column in self.columns.items()}

    def _load(self, state: dict[str, Any]) -> None:
        for name, column in self.columns.items():
            column.load(state[name])
