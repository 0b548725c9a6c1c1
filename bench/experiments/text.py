"""A small transformer on text: which package of Python's standard library do six lines come from?

    python text.py     # train it, print the accuracy

The text is the source of the Python that runs this, so there is nothing to download; rows differ a
little between versions of Python, and results should name theirs.
"""

from __future__ import annotations

import argparse
import math
import platform
import re
import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastif_ext import training

CLASSES = (
    *("asyncio", "email", "http", "importlib"),
    *("logging", "multiprocessing", "unittest", "xml"),
)
LINES = 6  # of a row
LENGTH = 64  # tokens of a row
WORDS = 2000  # of the vocabulary
ROWS = 700  # of a class
EPOCHS = 10
_TOKEN = re.compile(r"[A-Za-z_]+|[0-9]+|[^\w\s]")


class TextData(NamedTuple):
    """A text data set: token ids int64 [n, 64], padded with 0, and labels int64 [n]."""

    train: TensorDataset
    test: TensorDataset
    classes: tuple[str, ...]
    vocabulary: tuple[str, ...]
    """The word of each id; 0 pads, 1 is any word beyond the vocabulary."""


def load() -> TextData:
    """8 classes of 700 rows each; every fifth row drawn at random is a test row.

    A row is six successive non-blank lines of a file. Test rows come from the same files as
    training rows, so the task is one of recognition and not of transfer to new files.

    Raises:
        ValueError: this Python is installed without the source of its library.
    """
    draw = torch.Generator().manual_seed(0)
    rows: dict[str, list[list[str]]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for label, name in enumerate(CLASSES):
        texts = _rows(name)
        if len(texts) < ROWS:
            raise ValueError(
                f"the standard library's {name} has {len(texts)} rows of source, {ROWS} are "
                f"needed; use a Python that is installed with its source files"
            )
        for i, j in enumerate(torch.randperm(len(texts), generator=draw)[:ROWS].tolist()):
            part = "test" if i % 5 == 0 else "train"
            rows[part].append(texts[j])
            labels[part].append(label)
    counts = Counter(word for row in rows["train"] for word in row)
    # ties in alphabetical order: the same vocabulary every time
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: WORDS - 2]
    vocabulary = ("<pad>", "<unknown>", *frequent)
    number = {word: i for i, word in enumerate(vocabulary)}

    def dataset(part: str) -> TensorDataset:
        ids = torch.zeros(len(rows[part]), LENGTH, dtype=torch.int64)
        for i, row in enumerate(rows[part]):
            ids[i, : len(row)] = torch.tensor([number.get(word, 1) for word in row])
        order = torch.randperm(len(ids), generator=draw)
        return TensorDataset(ids[order], torch.tensor(labels[part])[order])

    return TextData(dataset("train"), dataset("test"), CLASSES, vocabulary)


def build(seed: int = 0, *, width: int = 64, layers: int = 2, heads: int = 4) -> nn.Module:
    """An untrained transformer from token ids [b, T <= 64] to logits [b, 8], float32.

    Two layers of width 64 have 199,688 parameters, 128,000 of them the words' vectors. Attention
    is written out, so that forward mode and double backward go through it. The same seed gives the
    same weights; torch's global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Transformer(width, layers, heads)


class Transformer(nn.Module):
    """Word and position vectors, layers, the mean over the words, a linear `head`."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        nn.init.normal_(self.words.weight, std=0.1)  # rare words, hardly trained, stay quiet
        self.drop = nn.Dropout(0.3)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(CLASSES))

    def forward(self, ids: Tensor) -> Tensor:
        present = ids != 0
        x = self.drop(self.words(ids)) + self.positions[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, present[:, None, None, :])
        share = present / present.sum(1, keepdim=True).clamp(min=1)
        return self.head((self.norm(x) * share[:, :, None].to(x.dtype)).sum(1))


class Layer(nn.Module):
    """Self-attention, then a two-layer network; both residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """Of words x [b, T, width]; allowed, bool, is broadcast to [b, heads, word, from word]."""
        b, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(b, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [b, heads, T, width / heads]
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~allowed, -1e9)  # not -inf: a row may be empty
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, length, width)
        x = x + self.out(mixed)
        return x + self.mlp(self.norm_mlp(x))


def train(model: nn.Module, data: TextData, *, seed: int = 0, progress: bool = False) -> None:
    """Train in place: Adam, 10 epochs, about a minute on one core."""
    options = {"batch_size": 64, "lr": 2e-3, "weight_decay": 1e-4}
    training.train(model, data.train, epochs=EPOCHS, seed=seed, progress=progress, **options)


def _rows(package: str) -> list[list[str]]:
    """The tokens of each row of a package's source, tests left out."""
    folder = Path(sysconfig.get_path("stdlib")) / package
    found = []
    for path in sorted(folder.rglob("*.py")):
        if {"test", "tests"} & set(path.relative_to(folder).parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in source.splitlines() if line.strip()]
        for i in range(0, len(lines) - LINES + 1, LINES):
            found.append(_TOKEN.findall("\n".join(lines[i : i + LINES]).lower())[:LENGTH])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, model = load(), build(args.seed)
    words = (data.train.tensors[0] > 0).sum(1).float().mean()
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"Python {platform.python_version()}: {len(data.train)} training and {len(data.test)} test "
        f"rows of {words:.0f} words in the mean; {parameters} parameters"
    )
    start = time.perf_counter()
    train(model, data, seed=args.seed, progress=True)
    seconds = time.perf_counter() - start
    for name, part in (("training", data.train), ("test", data.test)):
        print(f"accuracy on {name} rows: {100 * training.accuracy(model, part):.1f} %")
    print(f"{seconds:.0f} s on one thread")


if __name__ == "__main__":
    main()
