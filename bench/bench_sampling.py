"""Sampling from logits: one draw per class without and with replacement, and one pooled draw."""

from __future__ import annotations

from collections.abc import Callable

import floors
import pytest
import torch
from cases import cases
from torch import Tensor

import fastif_ext as fi

Timed = Callable[..., None]
CLASSES = {
    "cpu": [(50_000, 10, 160), (1_000_000, 10, 160), (200_000, 100, 100), (1_000_000, 100, 100)],
    "cuda": [
        (50_000, 10, 160),
        (1_000_000, 10, 160),
        (1_000_000, 100, 100),
        (1_000_000, 1000, 100),
    ],
}
POOL = {"cpu": [(50_000, 10), (1_000_000, 10)], "cuda": [(50_000, 10), (1_000_000, 1000)]}


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
@pytest.mark.parametrize("case", cases(CLASSES))
def test_class_multinomial(
    name: str, case: tuple, device: str, here: Callable, rows: Callable[[int], int], timed: Timed
) -> None:
    n, classes, k = here(case)
    n = rows(n)
    k = min(k, n)
    if name.startswith("torch.multinomial") and n > 1 << 24:
        pytest.skip("torch.multinomial takes 2^24 rows at most")
    logits = 3 * torch.randn(n, classes, device=device)
    group = f"class_multinomial n={n} Y={classes} k={k}"
    timed(group, lambda: IMPLEMENTATIONS[name](logits, k), floors.read_logits(n, classes))


def curvature_twin(logits: Tensor, m: int) -> Tensor:
    p = logits.softmax(1)
    return torch.multinomial(1 - p.square().sum(1), m)


@pytest.mark.parametrize("name", ["fastif_ext", "eager + torch.multinomial"])
@pytest.mark.parametrize("case", cases(POOL))
def test_curvature_multinomial(
    name: str, case: tuple, device: str, here: Callable, rows: Callable[[int], int], timed: Timed
) -> None:
    n, classes = here(case)
    n = rows(n)
    logits = 3 * torch.randn(n, classes, device=device)
    m = min(400, n)
    call = {
        "fastif_ext": lambda: fi.curvature_multinomial(logits, m, seed=0),
        "eager + torch.multinomial": lambda: curvature_twin(logits, m),
    }[name]
    group = f"curvature_multinomial n={n} Y={classes} m={m}"
    timed(group, call, floors.read_logits(n, classes))
