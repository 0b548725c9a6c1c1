"""A fold kept in a file while a loader is read, to go on after an interruption."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastif_ext import fingerprint
from fastif_ext.samplers.fold import Fold
from fastif_ext.saving import Resumable, replacing
from fastif_ext.stream import ExtractedBatch


class Checkpoint(Resumable):
    """The file. Where it exists already, the fold takes on the state in it.

    Args:
        path: of the file.
        fold: a new fold.
        made_of: what the state depends on besides the fold's own arguments.

    Raises:
        ValueError: the file holds something else, or the state of other data, model or arguments.
    """

    def __init__(
        self, path: str | os.PathLike[str], fold: Fold, made_of: Mapping[str, Any]
    ) -> None:
        self.path, self.fold = Path(path), fold
        if not self.path.parent.is_dir():
            raise ValueError(f"state: the folder of {self.path} does not exist; make it first")
        self._made_of = {"sampler": fold.name, "arguments": fold.arguments, **made_of}
        super().__init__(self._load() if self.path.exists() else 0)

    def _take(self, batch: ExtractedBatch) -> None:
        self.fold.update(batch)

    def _write(self) -> None:
        with replacing(self.path) as file:
            torch.save(
                {
                    "made_of": self._made_of,
                    "batches": self.batches,
                    "fold": self.fold.state_dict(),
                },
                file,
            )

    def remove(self) -> None:
        """The sampler is drawn: nothing is left to go on with."""
        self.path.unlink(missing_ok=True)

    def _load(self) -> int:
        """Gives the fold its state; returns how many batches are in it."""
        try:
            saved = torch.load(self.path, weights_only=True)
            made_of, batches, state = saved["made_of"], saved["batches"], saved["fold"]
        except (
            RuntimeError,
            EOFError,
            KeyError,
            TypeError,
            IndexError,
            pickle.UnpicklingError,
        ) as error:
            raise ValueError(
                f"state: {self.path} is not the state of a sampler ({error}); give the name of a "
                f"file that does not exist yet"
            ) from error
        fingerprint.require_same("the state", self.path, made_of, self._made_of)
        self.fold.load_state_dict(state)
        return int(batches)
