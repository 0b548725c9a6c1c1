"""Sampling from logits: one draw per class without and with replacement, and one pooled draw."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastif_ext as fi

CASES = [(50_000, 10, 160), (1_000_000, 10, 160), (200_000, 100, 100), (1_000_000, 100, 100)]


def gumbel_topk(logits: Tensor, k: int) -> Tensor:
    noise = torch.empty_like(logits).exponential_().log_().neg_()
    return (logits.log_softmax(1) + noise).topk(k, dim=0).indices


IMPLEMENTATIONS: dict[str, Callable[[Tensor, int], object]] = {
    "fastif_ext": lambda z, k: fi.class_multinomial(z, k, seed=0),
    "torch.multinomial": lambda z, k: torch.multinomial(z.softmax(1).t(), k),
    "torch.multinomial per class": lambda z, k: [
        torch.multinomial(p, k) for p in z.softmax(1).unbind(1)
    ],
    "gumbel + topk": gumbel_topk,
    "fastif_ext, replacement": lambda z, k: fi.class_multinomial(z, k, replacement=True, seed=0),
    "torch.multinomial, replacement": lambda z, k: torch.multinomial(z.softmax(1).t(), k, True),
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("n", "classes", "k"), CASES)
def test_class_multinomial(
    name: str, n: int, classes: int, k: int, rows: Callable[[int], int], timed: Callable[..., None]
) -> None:
    n = rows(n)
    logits = 3 * torch.randn(n, classes)
    k = min(k, n)
    timed(f"class_multinomial n={n} Y={classes} k={k}", lambda: IMPLEMENTATIONS[name](logits, k))


def curvature_twin(logits: Tensor, m: int) -> Tensor:
    p = logits.softmax(1)
    return torch.multinomial(1 - p.square().sum(1), m)


@pytest.mark.parametrize("name", ["fastif_ext", "eager + torch.multinomial"])
@pytest.mark.parametrize(("n", "classes"), [(50_000, 10), (1_000_000, 10)])
def test_curvature_multinomial(
    name: str, n: int, classes: int, rows: Callable[[int], int], timed: Callable[..., None]
) -> None:
    n = rows(n)
    logits = 3 * torch.randn(n, classes)
    m = min(400, n)
    call = {
        "fastif_ext": lambda: fi.curvature_multinomial(logits, m, seed=0),
        "eager + torch.multinomial": lambda: curvature_twin(logits, m),
    }[name]
    timed(f"curvature_multinomial n={n} Y={classes} m={m}", call)
