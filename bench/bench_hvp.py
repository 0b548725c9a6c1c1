"""Curvature products and the LiSSA update."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastif_ext as fi

Timed = Callable[..., None]


@pytest.mark.parametrize("name", ["fastif_ext", "torch._foreach", "eager"])
@pytest.mark.parametrize(("p", "R"), [(100_000, 1), (10_000_000, 1), (1_000_000, 8)])
def test_lissa_update(name: str, p: int, R: int, timed: Timed) -> None:
    shapes = [(p // 10,)] * 10
    hvp = [torch.randn(R, *s) for s in shapes]
    h, v = torch.zeros(R, p), torch.randn(R, p)
    hs, vs = [torch.zeros(R, *s) for s in shapes], [torch.randn(R, *s) for s in shapes]
    damping, scale = 0.1, 10.0

    def foreach() -> list[Tensor]:
        new = torch._foreach_mul(hs, 1 - damping / scale)
        torch._foreach_add_(new, vs)
        torch._foreach_add_(new, hvp, alpha=-1 / scale)
        delta = torch._foreach_sub(new, hs)
        norms = [*torch._foreach_norm(delta), *torch._foreach_norm(new)]
        torch._foreach_copy_(hs, new)
        return norms

    def eager() -> tuple[Tensor, Tensor]:
        flat = torch.cat([t.reshape(R, -1) for t in hvp], 1)
        new = v + (1 - damping / scale) * h - flat / scale
        norms = (new - h).norm(dim=1), new.norm(dim=1)
        h.copy_(new)
        return norms

    call = {
        "fastif_ext": lambda: fi.lissa_update_(h, v, hvp, damping=damping, scale=scale),
        "torch._foreach": foreach,
        "eager": eager,
    }[name]
    timed(f"lissa_update_ p={p} R={R}", call)


@pytest.mark.parametrize("name", ["fastif_ext", "eager"])
@pytest.mark.parametrize(("n", "C", "R"), [(100_000, 10, 1), (100_000, 100, 1), (100_000, 10, 8)])
def test_softmax_hvp(
    name: str, n: int, C: int, R: int, rows: Callable[[int], int], timed: Timed
) -> None:
    n = rows(n)
    p, z, w = torch.randn(n, C).softmax(1), torch.randn(R, n, C), torch.rand(n)

    def eager() -> Tensor:
        return w[:, None] * p * (z - (p * z).sum(-1, keepdim=True))

    call = {"fastif_ext": lambda: fi.softmax_hvp(p, z, w), "eager": eager}[name]
    timed(f"softmax_hvp n={n} C={C} R={R}", call)


@pytest.mark.parametrize("name", ["fastif_ext", "GEMM form", "double backward"])
@pytest.mark.parametrize(
    ("n", "d", "C", "R"), [(60_000, 128, 10, 1), (60_000, 128, 10, 8), (50_000, 512, 100, 1)]
)
def test_linear_softmax_hvp(
    name: str, n: int, d: int, C: int, R: int, rows: Callable[[int], int], timed: Timed
) -> None:
    n = rows(n)
    x, p, v = torch.randn(n, d), torch.randn(n, C).softmax(1), torch.randn(R, C, d)

    def gemm() -> Tensor:
        z = (x @ v.reshape(R * C, d).t()).view(n, R, C)
        u = p[:, None] * (z - (p[:, None] * z).sum(-1, keepdim=True))
        return (u.view(n, R * C).t() @ x).view(R, C, d)

    weight = torch.randn(C, d, requires_grad=True)
    y = torch.randint(C, (n,))

    def double_backward() -> list[Tensor]:
        loss = torch.nn.functional.cross_entropy(x @ weight.t(), y, reduction="sum")
        (g,) = torch.autograd.grad(loss, weight, create_graph=True)
        return [torch.autograd.grad(g, weight, r, retain_graph=True)[0] for r in v]

    call = {
        "fastif_ext": lambda: fi.linear_softmax_hvp(x, p, v),
        "GEMM form": gemm,
        "double backward": double_backward,
    }[name]
    timed(f"linear_softmax_hvp n={n} d={d} C={C} R={R}", call)
