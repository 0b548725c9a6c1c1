"""Work that survives an interruption: files that are there whole or not at all, saved in time."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn
from torch.utils.data import DataLoader

from fastif_ext.stream import ExtractedBatch, Layer, stream

SAVE_EVERY = 30.0  # seconds
SHARE = 0.05  # of the time may go into saving: large states are saved less often


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write in; at the end of the block it takes the place of the one at `path`.

    Whoever is killed in between leaves the old file as it was, and beside it one whose name ends in
    ``.part``, which the next writer takes over.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from fastif_ext.saving import replacing
        >>> with TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "a") as file:
        ...         _ = file.write(b"whole")
        ...     print([p.name for p in Path(folder).iterdir()])
        ['a']
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name without the bytes
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


class Resumable(ABC):
    """Work on the batches of a loader that is kept on disk, to go on after an interruption."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        """How many are done."""
        self._saved = batches
        self._due = time.monotonic() + SAVE_EVERY

    def read_on(
        self,
        model: nn.Module | None,
        loader: DataLoader[Any],
        *,
        first_row: int,
        layer: Layer,
        device: torch.device | str | None,
        progress: bool,
    ) -> None:
        """Take in what follows of a pass of the model over the loader, from its row `first_row` on.

        The model is as it was found afterwards, whoever keeps an error's traceback.
        """
        batches = stream(
            model,
            loader,
            layer=layer,
            device=device,
            progress=progress,
            first_batch=self.batches,
            first_row=first_row,
        )
        with closing(batches):
            self.read(batches)

    def read(self, batches: Iterable[ExtractedBatch]) -> None:
        """Take in the batches that follow; save now and then, and where it is interrupted."""
        whole = True  # whether self.batches is what is in
        try:
            for batch in batches:
                whole = False
                self._take(batch)
                self.batches += 1
                whole = True
                if time.monotonic() >= self._due:
                    self.save()
        except BaseException:
            if whole:
                self.save()
            raise

    def save(self) -> None:
        """Write what is new."""
        if self.batches == self._saved:
            return
        begin = time.monotonic()
        self._write()
        self._saved = self.batches
        end = time.monotonic()
        self._due = end + max(SAVE_EVERY, (end - begin) / SHARE)

    @abstractmethod
    def _take(self, batch: ExtractedBatch) -> None:
        """Take in one batch."""

    @abstractmethod
    def _write(self) -> None:
        """Write what is in, so that a kill at any time leaves this state or the one before."""
