"""The small problem that the tests of fastif_ext.distributed share: the same in every process."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

N, WIDTH, CLASSES = 203, 7, 4  # rows that no number of ranks divides


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, CLASSES)
        return nn.Sequential(*layers).double()


def data(n: int = N) -> TensorDataset:
    x = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return TensorDataset(*(t[:n] for t in (x, (x[:, :CLASSES] * 2).argmax(1))))


def loader(n: int = N) -> DataLoader:
    return DataLoader(data(n), batch_size=16)


def points(n: int = 501) -> Tensor:
    """Rows in three heaps, float32."""
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(3))
    return x + 4 * (torch.arange(n) % 3)[:, None]


def tokens() -> tuple[nn.Module, DataLoader]:
    """A model of sequences, and sequences of which tokens here and there have no label."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, CLASSES)).double()
        ids, labels = torch.randint(20, (30, 5)), torch.randint(CLASSES, (30, 5))
        labels[torch.rand(30, 5) < 0.3] = -100
    return model, DataLoader(TensorDataset(ids, labels), 4)
