"""A fold kept in a file while a loader is read, to go on after an interruption."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastif_ext import fingerprint
from fastif_ext.atomic import replacing
from fastif_ext.samplers.fold import Fold

SAVE_EVERY = 30.0  # seconds
SHARE = 0.05  # of the time may go into saving: large states are saved less often


class Checkpoint:
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
        self.batches = 0
        """How many batches are in the fold."""
        self._made_of = {"sampler": fold.name, "arguments": fold.arguments, **made_of}
        if self.path.exists():
            self._load()
        self._saved = self.batches
        self._due = time.monotonic() + SAVE_EVERY

    def save_if_due(self) -> None:
        """Save, where it is time to."""
        if time.monotonic() >= self._due:
            self.save()

    def save(self) -> None:
        """Write what is new: the file is there whole or as it was before."""
        if self.batches == self._saved:
            return
        begin = time.monotonic()
        with replacing(self.path) as file:
            torch.save(
                {
                    "made_of": self._made_of,
                    "batches": self.batches,
                    "fold": self.fold.state_dict(),
                },
                file,
            )
        self._saved = self.batches
        end = time.monotonic()
        self._due = end + max(SAVE_EVERY, (end - begin) / SHARE)

    def remove(self) -> None:
        """The sampler is drawn: nothing is left to go on with."""
        self.path.unlink(missing_ok=True)

    def _load(self) -> None:
        try:
            saved = torch.load(self.path, weights_only=True)
            made_of, batches, state = saved["made_of"], saved["batches"], saved["fold"]
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"state: {self.path} is not the state of a sampler ({error}); give the name of a "
                f"file that does not exist yet"
            ) from error
        fingerprint.require_same("the state", self.path, made_of, self._made_of)
        self.fold.load_state_dict(state)
        self.batches = batches
