"""Curvature operators away from the CPU: values, the model's device, nothing that waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastif_ext as fi

pytestmark = pytest.mark.usefixtures("one_thread")

Make = Callable[[nn.Module, Any, Any], Any]
OPERATORS: dict[str, Make] = {
    "hessian": lambda model, data, params: fi.Hessian(model, F.cross_entropy, data, params=params),
    "hessian in chunks": lambda model, data, params: fi.Hessian(
        model, F.cross_entropy, data, params=params, graph_memory=1 << 14
    ),
    "weighted": lambda model, data, params: fi.Hessian(
        model, F.cross_entropy, data, params=params, weights=torch.linspace(0, 0.1, 30)
    ),
    "gauss-newton": lambda model, data, params: fi.GaussNewton(model, data, params=params),
    "gauss-newton, other loss": lambda model, data, params: fi.GaussNewton(
        model, data, loss_fn=lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1)
        if out.dim() == 2
        else F.cross_entropy(out, y),
        params=params,
    ),
}  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(1)
    convolutions = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten()
    return nn.Sequential(*convolutions, nn.Linear(32, 4)).double().eval()


def rows() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(30, 1, 4, 4, generator=g, dtype=torch.float64), torch.arange(30) % 4


def mask(model: nn.Module) -> Tensor:
    total = sum(p.numel() for p in model.parameters())
    return torch.arange(total) % 3 == 0


@pytest.mark.parametrize("select", [None, ["4.*"], mask], ids=["all", "layer", "mask"])
@pytest.mark.parametrize("name", OPERATORS)
def test_products_are_those_of_the_cpu(name: str, select: Any, place: str) -> None:
    """The data stays on the CPU: a batch is moved to the model."""
    model = network()
    params = select(model) if callable(select) else select
    want = OPERATORS[name](model, rows(), params)
    got = OPERATORS[name](network().to(place), rows(), params)
    v = torch.randn(3, want.dim, dtype=torch.float64)
    assert got.device.type == place
    for part in (v, v[0]):
        product = got @ part.to(place)
        assert product.device.type == place
        torch.testing.assert_close(product.cpu(), want @ part)
    parts = got.products(v.to(place))
    torch.testing.assert_close(torch.cat([p.flatten(1) for p in parts], 1).cpu(), want @ v)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_product_neither_waits_nor_uploads(
    name: str, simulated: Callable[[Tensor], Tensor], traffic: Any
) -> None:
    """What makes it possible to run ahead of the device, and to record a product."""
    model = network().to("simulated")
    H = OPERATORS[name](model, rows(), mask(model))
    v = simulated(torch.randn(2, H.dim, dtype=torch.float64))
    H @ v  # the graph, and where the mask is true
    traffic.waits.clear()
    traffic.uploads.clear()
    for _ in range(3):
        v = H @ v
    assert not traffic.waits
    assert not traffic.uploads


def test_linear_softmax_lies_with_its_layer(place: str) -> None:
    loader = DataLoader(TensorDataset(*rows()), batch_size=7)
    want = fi.LinearSoftmaxHessian.of_last_layer(network(), loader)
    got = fi.LinearSoftmaxHessian.of_last_layer(network().to(place), loader)
    assert got.device.type == place
    v = torch.randn(2, want.dim, dtype=torch.float64)
    torch.testing.assert_close((got @ v.to(place)).cpu(), want @ v)
    moved = want.to(place)
    torch.testing.assert_close((moved @ v.to(place)).cpu(), (got @ v.to(place)).cpu())
    if place != "cpu":
        with pytest.raises(ValueError, match="use v.to"):
            moved @ v
        with pytest.raises(ValueError, match="move both to one device"):
            fi.LinearSoftmaxHessian(torch.ones(2, 3).to(place), torch.ones(2, 3))


def test_normal_equations_and_directions(place: str) -> None:
    from fastif_ext.curvature import NormalEquations
    from fastif_ext.parameters import Selection

    products = []
    for where in ("cpu", place):
        model = network().to(where)
        H = fi.Hessian(model, F.cross_entropy, rows())
        N = NormalEquations(H, Selection(model, mask(model)), damping=0.1)
        v = torch.linspace(-1, 1, N.dim, dtype=torch.float64).to(where)
        products.append((N @ v).cpu())
        assert (H @ torch.ones(H.dim, dtype=torch.float64).to(where)).device.type == where
        parts = H.unflatten(torch.ones(H.dim, dtype=torch.float64).to(where))
        assert {p.device.type for p in parts.values()} == {where}
    torch.testing.assert_close(products[1], products[0])


def test_ambient_autocast_changes_nothing() -> None:
    model = network().float()
    x, y = rows()
    H = fi.Hessian(model, F.cross_entropy, (x.float(), y))
    G = fi.GaussNewton(model, (x.float(), y))
    v = torch.randn(2, H.dim)
    want = H @ v, G @ v, fi.mean_gradient(model, F.cross_entropy, (x.float(), y))
    with torch.autocast("cpu", torch.bfloat16):
        again = fi.Hessian(model, F.cross_entropy, (x.float(), y))
        got = again @ v, G @ v, fi.mean_gradient(model, F.cross_entropy, (x.float(), y))
        solved = fi.cg(again, v, damping=1.0)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(solved.x, fi.cg(H, v, damping=1.0).x)


def test_the_cuda_random_state_is_left_alone(place: str) -> None:
    """No construction, product or gradient draws from the generators of the user."""
    if place == "simulated":
        pytest.skip("it has no generator")
    states = [torch.get_rng_state]
    if place == "cuda":
        states.append(torch.cuda.get_rng_state)
    before = [state() for state in states]
    model = network().to(place)
    before = [state() for state in states]
    H = fi.Hessian(model, F.cross_entropy, DataLoader(TensorDataset(*rows()), 8))
    H @ torch.ones(H.dim, dtype=torch.float64, device=place)
    fi.mean_gradient(model, F.cross_entropy, rows())
    for state, old in zip(states, before, strict=True):
        assert torch.equal(state(), old)
