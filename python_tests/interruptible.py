"""A small network and rows that can be taken away in the middle of a pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

N, Y, BATCH = 90, 3, 10
X = torch.randn(N, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(N) % Y


def net(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, Y)).to(dtype)


class Rows(Dataset[Any]):
    """Counts the rows it gives; those from `stop` on are out of reach."""

    def __init__(self, stop: int = N) -> None:
        self.stop = stop
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if i >= self.stop:
            raise KeyboardInterrupt
        self.loaded.append(i)
        return X[i], LABELS[i]


class Stream(IterableDataset[Any]):
    """The same one after the other, of unknown length."""

    def __init__(self, stop: int = N) -> None:
        self.rows = Rows(stop)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.rows[i] for i in range(N))


def loader(data: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=BATCH)
