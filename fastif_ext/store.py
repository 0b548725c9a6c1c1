"""A folder of what a pass over a loader gave: .npy files, and a manifest that says of what."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext import fingerprint
from fastif_ext.blocks import as_tensor
from fastif_ext.saving import Resumable, replacing
from fastif_ext.stream import ExtractedBatch, Layer

MANIFEST = "manifest.json"
FORMAT = "fastif_ext store 1"
HEADER = 128  # bytes of a .npy file before its data, whatever its shape
# Of the dtypes that numpy lacks, the bits are kept.
BITS = {torch.bfloat16: torch.uint16}


class Writer(Resumable):
    """Fills a folder batch by batch.

    A row is in the store when the manifest counts it: the manifest is replaced as a whole, after
    the files were flushed to disk. What a killed process wrote behind the last counted row is
    overwritten when the pass goes on.

    Args:
        folder: new, empty, or with a store of the same model, layer and data.
        model: what is run.
        loader: over what.
        layer: where features come from.

    Raises:
        ValueError: the folder has other files, or a store that does not match.
    """

    def __init__(
        self, folder: Path, model: nn.Module, loader: DataLoader[Any], layer: Layer
    ) -> None:
        made_of = {
            "model": fingerprint.of_model(model),
            "layer": fingerprint.of_layer(layer),
            "data": fingerprint.of_data(loader),
        }
        self.folder = folder
        if (folder / MANIFEST).exists():
            self.manifest = _manifest(folder)
            fingerprint.require_same("the store", folder, self.manifest["made_of"], made_of)
            self._require_whole()
        else:
            if folder.exists() and (not folder.is_dir() or _others(folder)):
                raise ValueError(
                    f"store: {folder} has files that are not a store's; give a new or empty folder"
                )
            folder.mkdir(parents=True, exist_ok=True)
            self.manifest = {
                "format": FORMAT,
                "complete": False,
                "rows": 0,
                "batches": 0,
                "arrays": {},
                "made_of": made_of,
            }
            self._write_manifest()
        super().__init__(self.manifest["batches"])
        self.rows = self.manifest["rows"]

    def _require_whole(self) -> None:
        """The files hold the rows that the manifest speaks of."""
        for name, array in self.manifest["arrays"].items():
            path = _path(self.folder, name)
            size, least = (
                path.stat().st_size if path.exists() else 0,
                HEADER + self.manifest["rows"] * _row_bytes(array),
            )
            if self.manifest["rows"] and size < least:
                raise ValueError(
                    f"the store in {self.folder} is damaged: {path.name} has {size} bytes, its "
                    f"{self.manifest['rows']} rows take {least}; delete the folder to begin anew"
                )

    @property
    def complete(self) -> bool:
        """Whether all rows are in."""
        return bool(self.manifest["complete"])

    def finish(self) -> None:
        """Declare the store complete.

        Raises:
            ValueError: there was no row.
        """
        if not self.rows:
            raise ValueError("extract: loader gave no batch; it needs at least one row")
        for name, array in self.manifest["arrays"].items():
            with _path(self.folder, name).open("r+b") as file:
                file.write(_header(array, self.rows))
        self.manifest["complete"] = True
        self._write()

    def _take(self, batch: ExtractedBatch) -> None:
        given = {"logits": batch.logits, "features": batch.features, "labels": batch.labels}
        tensors = {name: t.cpu() for name, t in given.items() if t is not None}
        like = {
            name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape[1:])}
            for name, t in tensors.items()
        }
        if not self.rows:
            self.manifest["arrays"] = like
            for name in like:
                _path(self.folder, name).touch()
        if like != self.manifest["arrays"]:
            raise ValueError(
                f"store: the rows before are {self.manifest['arrays']}, the batch at row "
                f"{self.rows} has {like}; all batches must be alike"
            )
        for name, t in tensors.items():
            with _path(self.folder, name).open("r+b") as file:
                file.seek(HEADER + self.rows * _row_bytes(like[name]))
                file.write(_numpy(t).data)
        self.rows += len(batch.logits)

    def _write(self) -> None:
        for name in self.manifest["arrays"]:
            with _path(self.folder, name).open("r+b") as file:
                os.fsync(file.fileno())
        self.manifest.update(rows=self.rows, batches=self.batches)
        if self.complete:
            for name, array in self.manifest["arrays"].items():
                os.truncate(_path(self.folder, name), HEADER + self.rows * _row_bytes(array))
        self._write_manifest()

    def _write_manifest(self) -> None:
        with replacing(self.folder / MANIFEST) as file:
            file.write(json.dumps(self.manifest, indent=1).encode())


def read(folder: Path) -> dict[str, Tensor]:
    """The arrays of a complete store, in files mapped into memory, not to be written in.

    Raises:
        ValueError: no store, not complete, or files that are not as the manifest says.
    """
    manifest = _manifest(folder)
    if not manifest["complete"]:
        raise ValueError(
            f"the store in {folder} has {manifest['rows']} rows and is not complete; call extract "
            f"with the same model and loader and store= to go on"
        )
    arrays = {}
    for name, array in manifest["arrays"].items():
        path, dtype = _path(folder, name), _dtype(array)
        try:
            # Not a private copy that could be written in: the system counts that as memory.
            mapped = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(f"the store in {folder} is damaged: {error}") from error
        expected = (manifest["rows"], *array["shape"]), _kept(dtype)
        if (mapped.shape, mapped.dtype) != expected:
            raise ValueError(
                f"the store in {folder} is damaged: {path.name} holds {mapped.dtype} "
                f"{list(mapped.shape)}, the manifest says {expected[1]} {list(expected[0])}"
            )
        arrays[name] = as_tensor(mapped).view(dtype)
    return arrays


def _others(folder: Path) -> bool:
    """Whether there are files but the remains of a first manifest."""
    return any(path.name != MANIFEST + ".part" for path in folder.iterdir())


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        known = manifest["format"] == FORMAT
        for key in ("complete", "rows", "batches", "arrays", "made_of"):
            manifest[key]
        for array in manifest["arrays"].values():
            _row_bytes(array)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"store: {folder} is not a store of fastif_ext ({error})") from error
    if not known:
        raise ValueError(f"store: {folder} has format {manifest['format']!r}, not {FORMAT!r}")
    return manifest


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _dtype(array: dict[str, Any]) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, array["dtype"])
    return dtype


def _kept(dtype: torch.dtype) -> np.dtype[Any]:
    """The dtype in the file."""
    return _numpy(torch.empty(0, dtype=dtype)).dtype


def _numpy(t: Tensor) -> np.ndarray:
    t = t.contiguous()
    return t.view(BITS.get(t.dtype, t.dtype)).numpy()


def _row_bytes(array: dict[str, Any]) -> int:
    return int(np.prod(array["shape"], dtype=np.int64)) * _kept(_dtype(array)).itemsize


def _header(array: dict[str, Any], rows: int) -> bytes:
    """The head of a .npy file, version 1.0, padded: it can be written when the rows are known."""
    about = {
        "descr": np.lib.format.dtype_to_descr(_kept(_dtype(array))),
        "fortran_order": False,
        "shape": (rows, *array["shape"]),
    }
    text = repr(about).encode("latin1")
    length = HEADER - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"
