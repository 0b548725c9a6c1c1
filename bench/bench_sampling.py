"""Sampling from logits: one draw per class without and with replacement, and one pooled draw."""

from __future__ import annotations

from collections.abc import Callable

import floors
import pytest
import torch
from cases import cases, titled
from rounds import Job
from torch import Tensor

import fastif_ext as fi

CLASSES = {
    "cpu": [(1_000, 10, 20), (50_000, 10, 160), (1_000_000, 10, 160), (1_000_000, 100, 100)],
    "cuda": [
        (50_000, 10, 160),
        (1_000_000, 10, 160),
        (1_000_000, 100, 100),
        (1_000_000, 1000, 100),
    ],
}
POOL = {
    "cpu": [(1_000, 10, 100), (50_000, 10, 400), (1_000_000, 10, 400), (200_000, 100, 400)],
    "cuda": [(50_000, 10, 400), (1_000_000, 1000, 400)],
}

HALF = {"cpu": [(200_000, 100, 100)], "cuda": [(1_000_000, 1000, 100)]}


def gumbel_topk(logits: Tensor, k: int) -> Tensor:
    z = logits.float()
    noise = torch.empty_like(z).exponential_().log_().neg_()
    return (z.log_softmax(1) + noise).topk(k, dim=0).indices


def torch_multinomial(logits: Tensor, k: int, replacement: bool = False) -> Tensor:
    if len(logits) > 1 << 24:
        pytest.skip("torch.multinomial takes 2^24 rows at most")
    return torch.multinomial(logits.float().softmax(1).t(), k, replacement)


DISTINCT: dict[str, Callable[[Tensor, int], object]] = {
    "fastif_ext": lambda z, k: fi.class_multinomial(z, k, seed=0),
    "torch.multinomial": torch_multinomial,
    "torch.multinomial per class": lambda z, k: [
        torch.multinomial(p, k) for p in z.float().softmax(1).unbind(1)
    ],
    "gumbel + topk": gumbel_topk,
}
REPLACEMENT: dict[str, Callable[[Tensor, int], object]] = {
    "fastif_ext": lambda z, k: fi.class_multinomial(z, k, replacement=True, seed=0),
    "torch.multinomial": lambda z, k: torch_multinomial(z, k, True),
}


def curvature_eager(logits: Tensor, m: int) -> Tensor:
    p = logits.float().softmax(1)
    return torch.multinomial(1 - p.square().sum(1), m)


POOLED: dict[str, Callable[[Tensor, int], object]] = {
    "fastif_ext": lambda z, m: fi.curvature_multinomial(z, m, seed=0),
    "eager + torch.multinomial": curvature_eager,
}


def drawing(
    ways: dict[str, Callable[[Tensor, int], object]],
    n: int,
    classes: int,
    k: int,
    device: str,
    dtype: str = "float32",
) -> Job:
    logits = (3 * torch.randn(n, classes, device=device)).to(getattr(torch, dtype))
    calls = {name: lambda way=way: way(logits, k) for name, way in ways.items()}
    return Job(calls, floors.read_logits(n, classes, item=logits.element_size()))


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.parametrize("case", cases(CLASSES, "float32") + cases(HALF, "bfloat16", "float16"))
def test_class_multinomial(name, case, device, here, rows, compare) -> None:
    n, classes, k, dtype = here(case)
    n = rows(n)
    k = min(k, n)
    group = f"{titled('class_multinomial', dtype)} n={n} Y={classes} k={k}"
    compare(name, group, lambda: drawing(DISTINCT, n, classes, k, device, dtype))


@pytest.mark.parametrize("name", REPLACEMENT)
@pytest.mark.parametrize("case", cases(CLASSES))
def test_class_multinomial_replacement(name, case, device, here, rows, compare) -> None:
    n, classes, k = here(case)
    n = rows(n)
    group = f"class_multinomial, replacement n={n} Y={classes} k={k}"
    compare(name, group, lambda: drawing(REPLACEMENT, n, classes, k, device))


@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("case", cases(POOL, "float32") + cases(HALF, "bfloat16", "float16"))
def test_curvature_multinomial(name, case, device, here, rows, compare) -> None:
    n, classes, m, dtype = here(case)
    n = rows(n)
    m = min(m, n)
    group = f"{titled('curvature_multinomial', dtype)} n={n} Y={classes} m={m}"
    compare(name, group, lambda: drawing(POOLED, n, classes, m, device, dtype))
