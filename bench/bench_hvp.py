"""Curvature products and the LiSSA update."""

from __future__ import annotations

from collections.abc import Callable

import floors
import pytest
import torch
from cases import cases, compiled
from torch import Tensor

import fastif_ext as fi

Timed = Callable[..., None]
LISSA = {
    "cpu": [(100_000, 1), (10_000_000, 1), (1_000_000, 8)],
    "cuda": [(100_000, 1), (10_000_000, 1), (100_000_000, 1), (10_000_000, 8)],
}
SOFTMAX = {
    "cpu": [(100_000, 10, 1), (100_000, 100, 1), (100_000, 10, 8)],
    "cuda": [(10_000, 10, 1), (1_000_000, 10, 8), (1_000_000, 100, 8), (100_000, 1000, 8)],
}
LINEAR = {
    "cpu": [(60_000, 128, 10, 1), (60_000, 128, 10, 8), (50_000, 512, 100, 1)],
    "cuda": [(60_000, 512, 10, 8), (1_000_000, 512, 100, 8)],
}


@pytest.mark.parametrize("name", ["fastif_ext", "torch._foreach", "eager", "torch.compile"])
@pytest.mark.parametrize("case", cases(LISSA))
def test_lissa_update(name: str, case: tuple, device: str, here: Callable, timed: Timed) -> None:
    p, R = here(case)
    shapes = [(p // 10,)] * 10
    hvp = [torch.randn(R, *s, device=device) for s in shapes]
    h, v = torch.zeros(R, p, device=device), torch.randn(R, p, device=device)
    hs = [torch.zeros(R, *s, device=device) for s in shapes]
    vs = [torch.randn(R, *s, device=device) for s in shapes]
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
        "torch.compile": compiled(eager),
    }[name]
    timed(f"lissa_update_ p={p} R={R}", call, floors.lissa_update(p, R))


@pytest.mark.parametrize("name", ["fastif_ext", "eager", "torch.compile"])
@pytest.mark.parametrize("case", cases(SOFTMAX))
def test_softmax_hvp(
    name: str, case: tuple, device: str, here: Callable, rows: Callable[[int], int], timed: Timed
) -> None:
    n, C, R = here(case)
    n = rows(n)
    p = torch.randn(n, C, device=device).softmax(1)
    z, w = torch.randn(R, n, C, device=device), torch.rand(n, device=device)

    def eager() -> Tensor:
        return w[:, None] * p * (z - (p * z).sum(-1, keepdim=True))

    call = {
        "fastif_ext": lambda: fi.softmax_hvp(p, z, w),
        "eager": eager,
        "torch.compile": compiled(eager),
    }[name]
    timed(f"softmax_hvp n={n} C={C} R={R}", call, floors.softmax_hvp(n, C, R))


@pytest.mark.parametrize("name", ["fastif_ext", "GEMM form", "double backward"])
@pytest.mark.parametrize("case", cases(LINEAR))
def test_linear_softmax_hvp(
    name: str, case: tuple, device: str, here: Callable, rows: Callable[[int], int], timed: Timed
) -> None:
    n, d, C, R = here(case)
    n = rows(n)
    x, v = torch.randn(n, d, device=device), torch.randn(R, C, d, device=device)
    p = torch.randn(n, C, device=device).softmax(1)

    def gemm() -> Tensor:
        z = (x @ v.reshape(R * C, d).t()).view(n, R, C)
        u = p[:, None] * (z - (p[:, None] * z).sum(-1, keepdim=True))
        return (u.view(n, R * C).t() @ x).view(R, C, d)

    weight = torch.randn(C, d, device=device, requires_grad=True)
    y = torch.randint(C, (n,), device=device)

    def double_backward() -> list[Tensor]:
        loss = torch.nn.functional.cross_entropy(x @ weight.t(), y, reduction="sum")
        (g,) = torch.autograd.grad(loss, weight, create_graph=True)
        return [torch.autograd.grad(g, weight, r, retain_graph=True)[0] for r in v]

    call = {
        "fastif_ext": lambda: fi.linear_softmax_hvp(x, p, v),
        "GEMM form": gemm,
        "double backward": double_backward,
    }[name]
    timed(
        f"linear_softmax_hvp n={n} d={d} C={C} R={R}", call, floors.linear_softmax_hvp(n, d, C, R)
    )
