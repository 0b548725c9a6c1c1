"""Influence scores once the systems are solved: products of solutions with training gradients.

Every way goes through the rows in passes of the size that is best for it, found beforehand.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from cases import cases, relative_error
from rounds import Call, Job
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fastif_ext import models
from fastif_ext.directional import DirectionalDerivatives, forward_mode
from fastif_ext.objective import WeightedLoss

WAYS = ("fastif_ext", "forward mode", "per-example gradients")
SIZES = [(4096, R) for R in (1, 8, 32)], [(512, R) for R in (1, 8, 32)]
Way = Callable[[Tensor, Tensor], Tensor]


def best_passes(way: Way, x: Tensor, y: Tensor) -> Call:
    """The way through all rows, in passes of the size that took the least time."""

    def through(size: int) -> Call:
        pairs = list(zip(x.split(size), y.split(size), strict=True))
        return lambda: torch.cat([way(a, b) for a, b in pairs], 1)

    def seconds(size: int) -> float:
        call = through(size)
        call()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    sizes = [size for size in (32, 64, 128, 256, 512, 1024, 4096) if size <= max(32, len(x))]
    return through(min(sizes, key=seconds))


def scores(network: str, n: int, count: int, device: str) -> Job:
    model = models.build(network, seed=0).eval().to(device)
    shape = (n, 64) if network == "mlp" else (n, 1, 28, 28)
    x, y = torch.randn(shape, device=device), torch.randint(10, (n,), device=device)
    total = WeightedLoss(model, cross_entropy, (x, y))
    v = torch.randn(count, total.selection.dim, device=device)
    directions = total.selection.split(v)
    named = {k: p.detach() for k, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], xi: Tensor, yi: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, params, (xi[None],)), yi[None])

    def per_example_gradients(xs: Tensor, ys: Tensor) -> Tensor:
        g = vmap(grad(loss), (None, 0, 0))(named, xs, ys)
        return v @ torch.cat([t.flatten(1) for t in g.values()], 1).T

    ours = DirectionalDerivatives(total)
    size = ours.rows()

    def fastif() -> Tensor:
        pairs = zip(x.split(size), y.split(size), strict=True)
        return torch.cat([ours(a, b, directions) for a, b in pairs], 1)

    calls = {
        "fastif_ext": fastif,
        "forward mode": best_passes(lambda a, b: forward_mode(total, a, b, directions), x, y),
        "per-example gradients": best_passes(per_example_gradients, x, y),
    }
    exact_model = models.build(network, seed=0).eval().double()
    few = 16
    exact = WeightedLoss(exact_model, cross_entropy, (x[:few].cpu().double(), y[:few].cpu()))
    exact_directions = exact.selection.split(v.cpu().double())
    want = forward_mode(exact, x[:few].cpu().double(), y[:few].cpu(), exact_directions)
    return Job(calls, error=lambda got: relative_error(got[:, :few].cpu(), want))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("case", cases({"cpu": SIZES[0], "cuda": SIZES[0]}))
def test_mlp(name, case, device, here, rows, compare) -> None:
    n, count = here(case)
    n = rows(n)
    compare(name, f"scores mlp n={n} R={count}", lambda: scores("mlp", n, count, device))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("case", cases({"cpu": SIZES[1], "cuda": SIZES[1]}))
def test_cnn(name, case, device, here, rows, compare) -> None:
    n, count = here(case)
    n = rows(n)
    compare(name, f"scores cnn n={n} R={count}", lambda: scores("cnn", n, count, device))
