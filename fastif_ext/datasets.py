"""The data sets of the examples and experiments, read from files that the user has.

Nothing is downloaded and nothing is unpickled: digits comes with scikit-learn, the others are read
from their published binary files.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist

_FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_CIFAR_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_DIGITS = tuple("0123456789")
_N_CLASSES = 10
_BLOCK = 1 << 20


@dataclass(frozen=True)
class LoadedData:
    """A training and a test set, each of (inputs, labels)."""

    name: str
    """The data set's name, without the folder."""
    train: TensorDataset
    """Inputs [n, ...] and int64 labels [n]."""
    test: TensorDataset
    """As train."""
    classes: tuple[str, ...]
    """The name of each label."""


class _Idx(NamedTuple):
    """What distinguishes one data set in MNIST's format from another."""

    classes: tuple[str, ...]
    mean: float
    std: float
    remedy: str


_IDX = {
    "fashion-mnist": _Idx(
        _FASHION_CLASSES,
        0.2860,
        0.3530,
        "install Debian's package (sudo apt-get install dataset-fashion-mnist), or get the four "
        "files from https://github.com/zalandoresearch/fashion-mnist and name their folder: "
        "fashion-mnist:DIR",
    ),
    "mnist": _Idx(
        _DIGITS,
        0.1307,
        0.3081,
        "get MNIST's four IDX files (http://yann.lecun.com/exdb/mnist and its mirrors) and name "
        "their folder: mnist:DIR",
    ),
}
_CIFAR_REMEDY = (
    "get the binary version, cifar-10-binary.tar.gz, from "
    "https://www.cs.toronto.edu/~kriz/cifar.html, unpack it and name the folder: cifar10:DIR"
)
_CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
_CIFAR_STD = (0.2470, 0.2435, 0.2616)
_CIFAR_RECORD = 1 + 3 * 32 * 32

NAMES = ("digits", *_IDX, "cifar10")


def load(spec: str) -> LoadedData:
    """Load a data set by name.

    ============================== ================== ========= ================================
    spec                           inputs             dtype     from
    ============================== ================== ========= ================================
    ``"digits"``                   [n, 64], in [0, 1] float64   scikit-learn; 25 % are the test
                                                                set, the same ones every time
    ``"fashion-mnist[:DIR]"``      [n, 1, 28, 28]     float32   IDX files, gzip or not; DIR is by
                                                                default where Debian's
                                                                dataset-fashion-mnist puts them
    ``"mnist:DIR"``                [n, 1, 28, 28]     float32   IDX files, gzip or not
    ``"cifar10:DIR"``              [n, 3, 32, 32]     float32   data_batch_1..5.bin, test_batch.bin
                                                                in DIR or DIR/cifar-10-batches-bin
    ============================== ================== ========= ================================

    Images are scaled to [0, 1] and standardised per channel by the usual constants of their
    training set. Labels are int64 in 0..9.

    Args:
        spec: a name, with a colon and a folder where one is needed; ``~`` is expanded.

    Raises:
        ValueError: an unknown name, a missing or needless folder, a file that is not what its name
            says (wrong magic number, shape, size, label or count).
        FileNotFoundError: a folder or file is missing.
        ImportError: "digits" without scikit-learn.

    Example:
        >>> from fastif_ext import datasets
        >>> data = datasets.load("digits")
        >>> len(data.train), len(data.test), data.train.tensors[0].shape[1]
        (1347, 450, 64)
    """
    if not isinstance(spec, str):
        raise TypeError(f"spec must be a str such as 'digits', got {type(spec).__name__}")
    name, _, folder = spec.partition(":")
    if name not in NAMES:
        raise ValueError(
            f"spec = {spec!r}: there is no data set {name!r}; use digits, fashion-mnist[:DIR], "
            f"mnist:DIR or cifar10:DIR"
        )
    if name == "digits":
        if folder:
            raise ValueError(f"spec = {spec!r}: digits takes no folder; use 'digits'")
        return _digits()
    if not folder:
        if name != "fashion-mnist":
            raise ValueError(f"spec = {spec!r} names no folder; use '{name}:DIR'")
        return _mnist_like(name, FASHION_MNIST_FOLDER)
    path = Path(folder).expanduser()
    return _cifar10(path) if name == "cifar10" else _mnist_like(name, path)


def _digits() -> LoadedData:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as missing:
        raise ImportError(
            'the digits data set comes with scikit-learn: pip install "fastif_ext[cli]"'
        ) from missing
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        pixels / 16.0, labels.astype(np.int64), test_size=0.25, random_state=0, stratify=labels
    )
    x_train, x_test, y_train, y_test = (torch.from_numpy(np.ascontiguousarray(p)) for p in parts)
    return LoadedData(
        "digits", TensorDataset(x_train, y_train), TensorDataset(x_test, y_test), _DIGITS
    )


def _mnist_like(name: str, folder: Path) -> LoadedData:
    kind = _IDX[name]
    _check_folder(folder, name, kind.remedy)
    train, test = (
        TensorDataset(
            _standardise(images.unsqueeze(1), (kind.mean,), (kind.std,)), labels.to(torch.int64)
        )
        for images, labels in (
            _idx_split(folder, split, kind.remedy) for split in ("train", "t10k")
        )
    )
    return LoadedData(name, train, test, kind.classes)


def _idx_split(folder: Path, split: str, remedy: str) -> tuple[Tensor, Tensor]:
    """Images [n, 28, 28] and labels [n] of one split, uint8."""
    image_file = _find(folder, f"{split}-images-idx3-ubyte", remedy)
    label_file = _find(folder, f"{split}-labels-idx1-ubyte", remedy)
    images = _read_idx(image_file, (28, 28), remedy)
    labels = _read_idx(label_file, (), remedy)
    if len(images) != len(labels):
        raise ValueError(
            f"{image_file} holds {len(images)} images but {label_file} {len(labels)} labels: the "
            f"files do not belong together; {remedy}"
        )
    _check_labels(labels, label_file, remedy)
    return images, labels


def _find(folder: Path, name: str, remedy: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} has neither {name} nor {name}.gz; {remedy}")


def _read_idx(path: Path, shape: tuple[int, ...], remedy: str) -> Tensor:
    """The uint8 array [n, *shape] of an IDX file, plain or gzip.

    The format (as published with MNIST): a big-endian int32 magic number, two zero bytes, the type
    (8: uint8) and the number of dimensions; the dimensions as int32; the bytes in C order.
    """
    n_dims = 1 + len(shape)
    magic = 0x0800 + n_dims
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream: BinaryIO = gzip.GzipFile(fileobj=raw) if zipped else raw  # type: ignore[assignment]
        try:
            header = bytes(_read(stream, 4 + 4 * n_dims))
            found = int.from_bytes(header[:4], "big")
            if len(header) >= 4 and found != magic:
                raise ValueError(
                    f"{path} begins with the number {found:#010x}, an IDX file of {n_dims} "
                    f"dimension(s) of bytes with {magic:#010x}; {remedy}"
                )
            if len(header) < 4 + 4 * n_dims:
                raise ValueError(f"{path} ends within its IDX header; {remedy}")
            n, *dims = struct.unpack(f">{n_dims}I", header[4:])
            if tuple(dims) != shape:
                raise ValueError(
                    f"{path} holds arrays of shape {tuple(dims)}, expected {shape}; {remedy}"
                )
            if n == 0:
                raise ValueError(f"{path} is empty: its header says 0 rows; {remedy}")
            size = n * int(np.prod(shape, dtype=np.int64))
            body = _read(stream, size + 1)  # one more byte would show a file that goes on
        except (EOFError, zlib.error, gzip.BadGzipFile) as broken:
            raise ValueError(f"{path} is not a whole gzip file ({broken}); {remedy}") from broken
    if len(body) != size:
        raise ValueError(
            f"{path} should hold {size} bytes after its header ({n} x {shape}), found "
            f"{'more' if len(body) > size else len(body)}; {remedy}"
        )
    return torch.frombuffer(body, dtype=torch.uint8).reshape(n, *shape)


def _read(stream: BinaryIO, size: int) -> bytearray:
    """At most size bytes, in blocks: a false size in a header allocates nothing."""
    data = bytearray()
    while len(data) < size and (block := stream.read(min(_BLOCK, size - len(data)))):
        data += block
    return data


def _cifar10(folder: Path) -> LoadedData:
    _check_folder(folder, "cifar10", _CIFAR_REMEDY)
    child = folder / "cifar-10-batches-bin"
    if child.is_dir():
        folder = child
    train = [_read_cifar(folder / f"data_batch_{i}.bin") for i in range(1, 6)]
    test = [_read_cifar(folder / "test_batch.bin")]
    return LoadedData("cifar10", _cifar_set(train), _cifar_set(test), _CIFAR_CLASSES)


def _read_cifar(path: Path) -> Tensor:
    """Records [n, 3073] of one file: a label and the red, green and blue planes of 32 x 32."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {_CIFAR_REMEDY}")
    size = path.stat().st_size
    if size == 0 or size % _CIFAR_RECORD:
        raise ValueError(
            f"{path} has {size} bytes, expected a positive multiple of {_CIFAR_RECORD} (a label "
            f"and 3 x 32 x 32 pixels); {_CIFAR_REMEDY}"
        )
    records = torch.from_numpy(np.fromfile(path, np.uint8)).reshape(-1, _CIFAR_RECORD)
    _check_labels(records[:, 0], path, _CIFAR_REMEDY)
    return records


def _cifar_set(files: list[Tensor]) -> TensorDataset:
    records = torch.cat(files)
    images = records[:, 1:].reshape(-1, 3, 32, 32)
    return TensorDataset(
        _standardise(images, _CIFAR_MEAN, _CIFAR_STD), records[:, 0].to(torch.int64)
    )


def _check_folder(folder: Path, name: str, remedy: str) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: there is no folder {folder}; {remedy}")


def _check_labels(labels: Tensor, path: Path, remedy: str) -> None:
    if (largest := int(labels.max())) >= _N_CLASSES:
        raise ValueError(f"{path} has the label {largest}, expected 0..9; {remedy}")


def _standardise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [n, C, H, W] to float32, (x / 255 - mean) / std per channel."""
    shift, scale = (torch.tensor(v).reshape(-1, 1, 1) for v in (mean, std))
    return images.float().div_(255).sub_(shift).div_(scale)
