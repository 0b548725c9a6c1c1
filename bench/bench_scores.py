"""Influence scores once the systems are solved: products of solutions with training gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fastif_ext import models
from fastif_ext.directional import directional_derivatives, forward_mode
from fastif_ext.objective import WeightedLoss

Timed = Callable[..., None]
WAYS = ("fastif_ext", "forward mode", "per-example gradients")


def ways(network: str, rows: int, count: int, device: str) -> dict[str, Callable[[], Any]]:
    """Products of every example's gradient with `count` directions, three ways."""
    model = models.build(network, seed=0).eval().to(device)
    shape = (rows, 64) if network == "mlp" else (rows, 1, 28, 28)
    x, y = torch.randn(shape, device=device), torch.randint(10, (rows,), device=device)
    total = WeightedLoss(model, cross_entropy, (x, y))
    v = torch.randn(count, total.selection.dim, device=device)
    directions = total.selection.split(v)
    ours = directional_derivatives(total)
    named = {k: p.detach() for k, p in model.named_parameters()}

    def loss(params: dict[str, torch.Tensor], xi: torch.Tensor, yi: torch.Tensor) -> torch.Tensor:
        return cross_entropy(functional_call(model, params, (xi[None],)), yi[None])

    def per_example_gradients() -> torch.Tensor:
        parts = []
        for xs, ys in zip(x.split(256), y.split(256), strict=True):
            g = vmap(grad(loss), (None, 0, 0))(named, xs, ys)
            parts.append(v @ torch.cat([t.flatten(1) for t in g.values()], 1).T)
        return torch.cat(parts, 1)

    def in_chunks(way: Callable[..., torch.Tensor]) -> torch.Tensor:
        pairs = zip(x.split(256), y.split(256), strict=True)
        return torch.cat([way(xs, ys, directions) for xs, ys in pairs], 1)

    return {
        "fastif_ext": lambda: in_chunks(ours),
        "forward mode": lambda: in_chunks(lambda *a: forward_mode(total, *a)),
        "per-example gradients": per_example_gradients,
    }


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("count", [1, 8, 32])
@pytest.mark.parametrize(("network", "n"), [("mlp", 4096), ("cnn", 256)])
def test_scores(
    name: str,
    network: str,
    n: int,
    count: int,
    device: str,
    timed: Timed,
    rows: Callable[[int], int],
) -> None:
    call = ways(network, rows(n), count, device)[name]
    timed(f"scores {network} n={n} R={count}", call)
