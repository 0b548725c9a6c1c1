"""Curvature products and the LiSSA update."""

from __future__ import annotations

from typing import Any

import floors
import pytest
import torch
from cases import cases, compiled, relative_error, titled
from rounds import Call, Job
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

import fastif_ext as fi
from fastif_ext import models

LISSA = {
    "cpu": [(2_000, 1), (100_000, 1), (10_000_000, 1), (1_000_000, 8)],
    "cuda": [(100_000, 1), (10_000_000, 1), (100_000_000, 1), (10_000_000, 8)],
}
HALF = {"cpu": [(1_000_000, 8)], "cuda": [(10_000_000, 8)]}  # bfloat16 and float16 products
SOFTMAX = {
    "cpu": [(400, 10, 8), (10_000, 10, 8), (100_000, 10, 1), (100_000, 100, 1), (100_000, 10, 8)],
    "cuda": [(10_000, 10, 1), (1_000_000, 10, 8), (1_000_000, 100, 8), (100_000, 1000, 8)],
}
LINEAR = {
    "cpu": [(400, 128, 10, 8), (60_000, 128, 10, 1), (60_000, 128, 10, 8), (50_000, 512, 100, 1)],
    "cuda": [(60_000, 512, 10, 8), (1_000_000, 512, 100, 8)],
}
NETWORKS = {"mlp": (400, 64), "cnn": (100, 1, 28, 28)}
PRODUCTS = ("fastif_ext", "jvp + vjp", "curvlinops")


def lissa_update(p: int, R: int, device: str) -> Job:
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

    calls = {
        "fastif_ext": lambda: fi.lissa_update_(h, v, hvp, damping=damping, scale=scale),
        "torch._foreach": foreach,
        "eager": eager,
        "torch.compile": compiled(eager),
    }
    return Job(calls, floors.lissa_update(p, R))


def hvp_accumulate(p: int, R: int, device: str, dtype: str) -> Job:
    """One mini-batch's products, in the parameters' shapes, added to the sum."""
    hvp = [torch.randn(R, p // 10, device=device).to(getattr(torch, dtype)) for _ in range(10)]
    acc = torch.zeros(R, p, device=device)
    sums = [torch.zeros(R, p // 10, device=device) for _ in range(10)]
    weight = 0.25

    def foreach() -> None:
        torch._foreach_add_(sums, hvp, alpha=weight)

    def eager() -> None:
        acc.add_(torch.cat([t.reshape(R, -1) for t in hvp], 1), alpha=weight)

    calls = {
        "fastif_ext": lambda: fi.hvp_accumulate_(acc, hvp, weight),
        "torch._foreach": foreach,
        "eager": eager,
        "torch.compile": compiled(eager),
    }
    return Job(calls, floors.hvp_accumulate(p, R, product=hvp[0].element_size()))


def softmax_hvp(n: int, C: int, R: int, device: str) -> Job:
    p = torch.randn(n, C, device=device).softmax(1)
    z, w = torch.randn(R, n, C, device=device), torch.rand(n, device=device)

    def product(w: Tensor, p: Tensor, z: Tensor) -> Tensor:
        return w[:, None] * p * (z - (p * z).sum(-1, keepdim=True))

    few = slice(0, 1000)
    want = product(w[few].double(), p[few].double(), z[:, few].double())
    fast = compiled(product)
    calls = {
        "fastif_ext": lambda: fi.softmax_hvp(p, z, w),
        "eager": lambda: product(w, p, z),
        "torch.compile": lambda: fast(w, p, z),
    }
    return Job(calls, floors.softmax_hvp(n, C, R), lambda u: relative_error(u[:, few], want))


def linear_softmax_hvp(n: int, d: int, C: int, R: int, device: str) -> Job:
    x, v = torch.randn(n, d, device=device), torch.randn(R, C, d, device=device)
    weight = torch.randn(C, d, device=device, requires_grad=True)
    y = torch.randint(C, (n,), device=device)
    p = (x @ weight.t()).detach().softmax(1)

    def gemm(x: Tensor, p: Tensor, v: Tensor) -> Tensor:
        z = (x @ v.reshape(R * C, d).t()).view(n, R, C)
        u = p[:, None] * (z - (p[:, None] * z).sum(-1, keepdim=True))
        return (u.view(n, R * C).t() @ x).view(R, C, d)

    def double_backward() -> Tensor:
        loss = torch.nn.functional.cross_entropy(x @ weight.t(), y, reduction="sum")
        (g,) = torch.autograd.grad(loss, weight, create_graph=True)
        return torch.stack([torch.autograd.grad(g, weight, r, retain_graph=True)[0] for r in v])

    want = gemm(x.double(), p.double(), v.double())
    fast = compiled(gemm)
    calls = {
        "fastif_ext": lambda: fi.linear_softmax_hvp(x, p, v),
        "GEMM form": lambda: gemm(x, p, v),
        "torch.compile": lambda: fast(x, p, v),
        "double backward": double_backward,
    }
    return Job(calls, floors.linear_softmax_hvp(n, d, C, R), lambda u: relative_error(u, want))


def gauss_newton(network: str, n: int, R: int, device: str) -> Job:
    """Products with the Gauss-Newton matrix of a network under cross-entropy, from kept graphs."""
    model = models.build(network).to(device).eval()
    x = torch.randn(n, *NETWORKS[network][1:], device=device)
    y = torch.randint(10, (n,), device=device)
    G = fi.GaussNewton(model, (x, y))
    v = torch.randn(R, G.dim, device=device)

    def by_torch(model: nn.Module, x: Tensor, v: Tensor) -> Call:
        named = {k: p.detach() for k, p in model.named_parameters()}
        outputs, back = vjp(lambda p: functional_call(model, p, (x,)), named)
        probs = outputs.softmax(1)

        def one(direction: Tensor) -> Tensor:
            parts = direction.split([p.numel() for p in named.values()])
            tangents = {k: t.view_as(p) for (k, p), t in zip(named.items(), parts, strict=True)}
            z = jvp(lambda p: functional_call(model, p, (x,)), (named,), (tangents,))[1]
            u = probs * (z - (probs * z).sum(1, keepdim=True)) / n
            return torch.cat([g.flatten() for g in back(u)[0].values()])

        return lambda: vmap(one)(v)

    def curvlinops() -> Tensor:
        library = pytest.importorskip("curvlinops")
        parameters = [*model.parameters()]
        if not peer:
            peer.append(
                library.GGNLinearOperator(
                    model, nn.CrossEntropyLoss(), parameters, [(x, y)], check_deterministic=False
                )
            )
        return (peer[0] @ v.T).T

    peer: list[Any] = []
    want = by_torch(
        models.build(network, dtype=torch.float64), x.cpu().double(), v.cpu().double()
    )()
    calls = {
        "fastif_ext": lambda: G @ v,
        "jvp + vjp": by_torch(model, x, v),
        "curvlinops": curvlinops,
    }
    return Job(calls, error=lambda got: relative_error(got.detach().cpu(), want))


@pytest.mark.parametrize("name", ["fastif_ext", "torch._foreach", "eager", "torch.compile"])
@pytest.mark.parametrize("case", cases(LISSA))
def test_lissa_update(name, case, device, here, rows, compare) -> None:
    p, R = here(case)
    p = rows(p) // 10 * 10
    compare(name, f"lissa_update_ p={p} R={R}", lambda: lissa_update(p, R, device))


@pytest.mark.parametrize("name", ["fastif_ext", "torch._foreach", "eager", "torch.compile"])
@pytest.mark.parametrize("case", cases(LISSA, "float32") + cases(HALF, "bfloat16", "float16"))
def test_hvp_accumulate(name, case, device, here, rows, compare) -> None:
    p, R, dtype = here(case)
    p = rows(p) // 10 * 10
    group = f"{titled('hvp_accumulate_', dtype)} p={p} R={R}"
    compare(name, group, lambda: hvp_accumulate(p, R, device, dtype))


@pytest.mark.parametrize("name", ["fastif_ext", "eager", "torch.compile"])
@pytest.mark.parametrize("case", cases(SOFTMAX))
def test_softmax_hvp(name, case, device, here, rows, compare) -> None:
    n, C, R = here(case)
    n = rows(n)
    compare(name, f"softmax_hvp n={n} C={C} R={R}", lambda: softmax_hvp(n, C, R, device))


@pytest.mark.parametrize("name", ["fastif_ext", "GEMM form", "torch.compile", "double backward"])
@pytest.mark.parametrize("case", cases(LINEAR))
def test_linear_softmax_hvp(name, case, device, here, rows, compare) -> None:
    n, d, C, R = here(case)
    n = rows(n)
    group = f"linear_softmax_hvp n={n} d={d} C={C} R={R}"
    compare(name, group, lambda: linear_softmax_hvp(n, d, C, R, device))


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("R", [1, 8])
@pytest.mark.parametrize("network", NETWORKS)
def test_gauss_newton(name, network, R, device, rows, compare) -> None:
    n = rows(NETWORKS[network][0])
    group = f"GaussNewton {network} n={n} R={R}"
    compare(name, group, lambda: gauss_newton(network, n, R, device))
