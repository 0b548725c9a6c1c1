"""Reading data sets: values, layouts, and files that are not what they should be."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastif_ext import datasets

CIFAR_FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, *, zipped: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 7), ("t10k", 3)):
        arrays[f"{split}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28))
        arrays[f"{split}-labels-idx1-ubyte"] = rng.integers(0, 10, n)
    for name, array in arrays.items():
        data = idx(array)
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(data) if zipped else data)
    return arrays


def write_cifar(folder: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    folder.mkdir(exist_ok=True)
    files = {}
    for i, name in enumerate(CIFAR_FILES):
        records = rng.integers(0, 256, (i + 1, 3073)).astype(np.uint8)
        records[:, 0] %= 10
        files[name] = records
        records.tofile(folder / name)
    return files


def test_digits() -> None:
    data = datasets.load("digits")
    (x, y), (x_test, y_test) = data.train.tensors, data.test.tensors
    assert (data.name, data.classes) == ("digits", tuple("0123456789"))
    assert x.shape == (1347, 64)
    assert x_test.shape == (450, 64)
    assert (x.dtype, y.dtype) == (torch.float64, torch.int64)
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)
    share = y.bincount() / (y.bincount() + y_test.bincount())
    assert (share - 0.75).abs().max() < 0.01  # stratified
    again = datasets.load("digits")
    assert torch.equal(again.train.tensors[0], x)
    assert torch.equal(again.test.tensors[1], y_test)


def test_digits_are_a_partition_of_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    data = datasets.load("digits")
    got = torch.cat([torch.column_stack(part.tensors) for part in (data.train, data.test)])
    pixels, labels = load_digits(return_X_y=True)
    want = np.column_stack([pixels / 16, labels])
    assert np.array_equal(np.unique(got.numpy(), axis=0), np.unique(want, axis=0))
    assert len(got) == len(want)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "fastif_ext\[cli\]"'):
        datasets.load("digits")


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("name", "mean", "std"), [("mnist", 0.1307, 0.3081), ("fashion-mnist", 0.2860, 0.3530)]
)
def test_mnist_like(tmp_path: Path, name: str, mean: float, std: float, zipped: bool) -> None:
    arrays = write_mnist(tmp_path, zipped=zipped)
    data = datasets.load(f"{name}:{tmp_path}")
    assert data.name == name
    assert len(data.classes) == 10
    for part, split in ((data.train, "train"), (data.test, "t10k")):
        x, y = part.tensors
        images = arrays[f"{split}-images-idx3-ubyte"]
        assert x.shape == (len(images), 1, 28, 28)
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        want = torch.from_numpy((images[:, None] / 255 - mean) / std).float()
        torch.testing.assert_close(x, want, rtol=1e-6, atol=1e-6)
        assert y.tolist() == arrays[f"{split}-labels-idx1-ubyte"].tolist()


@pytest.mark.parametrize("child", ["", "cifar-10-batches-bin"])
def test_cifar10(tmp_path: Path, child: str) -> None:
    files = write_cifar(tmp_path / child)
    data = datasets.load(f"cifar10:{tmp_path}")
    assert (len(data.train), len(data.test)) == (15, 6)
    assert data.classes[3] == "cat"
    x, y = data.test.tensors
    records = files["test_batch.bin"]
    assert x.shape == (6, 3, 32, 32)
    assert y.tolist() == records[:, 0].tolist()
    # row 2, green, line 5, column 7: planes follow each other, lines within a plane
    value = int(records[2, 1 + 1024 + 5 * 32 + 7])
    assert float(x[2, 1, 5, 7]) == pytest.approx((value / 255 - 0.4822) / 0.2435, abs=1e-5)
    value = int(records[0, 1 + 2 * 1024])
    assert float(x[0, 2, 0, 0]) == pytest.approx((value / 255 - 0.4465) / 0.2616, abs=1e-5)
    first = files["data_batch_1.bin"][:, 0].tolist() + files["data_batch_2.bin"][:, 0].tolist()
    assert data.train.tensors[1].tolist()[:3] == first


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("imagenet", "no data set 'imagenet'; use digits"),
        ("", "no data set ''"),
        ("digits:/tmp", "digits takes no folder"),
        ("mnist", "use 'mnist:DIR'"),
        ("cifar10:", "use 'cifar10:DIR'"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datasets.load(spec)


def test_spec_must_be_a_string() -> None:
    with pytest.raises(TypeError, match="got PosixPath"):
        datasets.load(Path("/"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("fashion-mnist", "apt-get install dataset-fashion-mnist"),
        ("mnist", "mnist:DIR"),
        ("cifar10", "cifar-10-binary.tar.gz"),
    ],
)
def test_missing_folder_and_files(tmp_path: Path, name: str, remedy: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no folder .*absent.*{remedy}"):
        datasets.load(f"{name}:{tmp_path / 'absent'}")
    first = "data_batch_1.bin is missing" if name == "cifar10" else "train-images-idx3-ubyte.gz"
    with pytest.raises(FileNotFoundError, match=f"{first}.*{remedy}"):
        datasets.load(f"{name}:{tmp_path}")


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
GOOD = idx(np.zeros((7, 28, 28)))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (IMAGES, GOOD[:-1], "should hold 5488 bytes after its header .* found 5487"),
        (IMAGES, GOOD + b"\0", "found more"),
        (IMAGES, GOOD[:10], "ends within its IDX header"),
        (IMAGES, b"", "ends within its IDX header"),
        (IMAGES, idx(np.zeros(7)), "begins with the number 0x00000801, .* with 0x00000803"),
        (IMAGES, b"\x89PNG" + GOOD[4:], "begins with the number 0x89504e47"),
        (IMAGES, idx(np.zeros((7, 28, 27))), r"shape \(28, 27\), expected \(28, 28\)"),
        (IMAGES, idx(np.zeros((0, 28, 28))), "header says 0 rows"),
        (IMAGES, idx(np.zeros((6, 28, 28))), "6 images but .* 7 labels"),
        # a header that promises 3 TB must not allocate them
        (IMAGES, GOOD[:4] + b"\xff" * 4 + GOOD[8:], "should hold 3367254359"),
        (LABELS, idx(np.array([0, 1, 2, 3, 4, 10, 6])), "has the label 10, expected 0..9"),
        (LABELS, GOOD, "begins with the number 0x00000803"),
        (IMAGES, gzip.compress(GOOD)[:-12], "not a whole gzip file"),
        (IMAGES, gzip.compress(GOOD + b"\0" * 1000), "found more"),
    ],
)
def test_broken_idx(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    write_mnist(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}.*{message}|{message}") as error:
        datasets.load(f"mnist:{tmp_path}")
    assert str(tmp_path / file) in str(error.value)
    assert "mnist:DIR" in str(error.value)  # the remedy


def test_broken_gzip_body(tmp_path: Path) -> None:
    write_mnist(tmp_path, zipped=True)
    path = tmp_path / f"{IMAGES}.gz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match="not a whole gzip file"):
        datasets.load(f"mnist:{tmp_path}")


def test_broken_cifar(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    path = tmp_path / "data_batch_4.bin"
    good = path.read_bytes()
    for content, message in (
        (good[:-1], "has 12291 bytes, expected a positive multiple of 3073"),
        (b"", "has 0 bytes"),
        (b"\x0a" + good[1:], "has the label 10"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"data_batch_4.bin {message}.*cifar10:DIR"):
            datasets.load(f"cifar10:{tmp_path}")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4.bin is missing"):
        datasets.load(f"cifar10:{tmp_path}")


@pytest.mark.skipif(
    not datasets.FASHION_MNIST_FOLDER.is_dir(),
    reason=f"no {datasets.FASHION_MNIST_FOLDER}: apt-get install dataset-fashion-mnist",
)
def test_fashion_mnist_as_published() -> None:
    data = datasets.load("fashion-mnist")
    x, y = data.train.tensors
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert y.bincount().tolist() == [6000] * 10
    assert data.test.tensors[1].bincount().tolist() == [1000] * 10
    assert abs(float(x.mean())) < 1e-3
    assert abs(float(x.std()) - 1) < 1e-3
