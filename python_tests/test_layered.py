"""Hessian products written out for chains of layers, against dense float64 derivatives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import fastif_ext as fi
from fastif_ext.curvature import layered, layers
from fastif_ext.objective import WeightedLoss

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
N = 11


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)
    )


def cnn() -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=(2, 1), padding=(1, 2)),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.3),
        nn.Conv2d(3, 2, (2, 3), dilation=(1, 2), bias=False),
        nn.SiLU(),
        nn.Flatten(),
    )
    return nn.Sequential(
        features, nn.Sequential(nn.Linear(2 * 3 * 4, 4), nn.ELU(), nn.Linear(4, 3))
    )


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


def unbent() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.LeakyReLU(0.2), nn.ReLU6(), nn.Linear(6, 3)
    )


def normalized() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm1d(4),
        nn.Linear(4, 5),
        nn.BatchNorm1d(5, affine=False),
        nn.Tanh(),
        nn.Linear(5, 4, bias=False),
        nn.BatchNorm1d(4),
        nn.Softplus(),
        nn.Linear(4, 3),
    )


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 2, padding=1, bias=False),  # 8 x 7
        nn.BatchNorm2d(3),
        nn.SiLU(),
        nn.MaxPool2d((3, 2), stride=(1, 2), padding=1, ceil_mode=True),  # overlaps downwards
        nn.Conv2d(3, 4, 2),
        nn.AvgPool2d(2, stride=1, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "softmax": lambda: nn.Linear(4, 3),
    "mlp": mlp,
    "cnn": cnn,
    "tied": tied,
    "unbent": unbent,
    "normalized": normalized,
    "pooled": pooled,
}
IMAGES = ("cnn", "pooled")


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(N, 2, 7, 6) if name in IMAGES else torch.randn(N, 4)
    model = MODELS[name]().double()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for t in (module.running_mean, module.weight, module.bias):
                if t is not None:
                    t.data.normal_()
            module.running_var.uniform_(0.5, 2)
    return model, x.double(), torch.randint(3, (N,))


def dense(
    model: nn.Module, loss_fn: Any, x: Tensor, y: Tensor, weights: Tensor | None = None
) -> Tensor:
    """The Hessian over all trainable parameters by torch.func."""
    model = copy.deepcopy(model).eval()
    trainable = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in trainable.values()]

    def f(flat: Tensor) -> Tensor:
        parts = zip(trainable.items(), flat.split(sizes), strict=True)
        outputs = functional_call(model, {k: t.view_as(p) for (k, p), t in parts}, (x,))
        if weights is None:
            return loss_fn(outputs, y)
        each = [loss_fn(outputs[i : i + 1], y[i : i + 1]) for i in range(len(y))]
        return (torch.stack(each) * weights).sum()

    return torch.func.hessian(f)(torch.cat([p.flatten() for p in trainable.values()]))


def matrix(H: fi.Hessian) -> Tensor:
    return H @ torch.eye(H.dim, dtype=H.dtype)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_equals_dense(name: str, weighted: bool, chunk_size: int | None) -> None:
    model, x, y = case(name)
    weights = torch.rand(N, dtype=torch.float64) if weighted else None
    H = fi.Hessian(model, F.cross_entropy, (x, y), weights=weights, chunk_size=chunk_size)
    assert H.by_hand
    A, wanted = matrix(H), dense(model, F.cross_entropy, x, y, weights)
    torch.testing.assert_close(A, wanted, **CLOSE)
    torch.testing.assert_close(H @ torch.ones(H.dim, dtype=H.dtype), wanted.sum(1), **CLOSE)


@pytest.mark.parametrize("block", [1, 100, 1000])
@pytest.mark.parametrize("name", ["mlp", *IMAGES])
def test_blocks_of_rows_change_nothing(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = case(name)
    H = fi.Hessian(model, F.cross_entropy, (x, y))
    whole = matrix(H)
    monkeypatch.setattr(layered, "BLOCK", block)
    torch.testing.assert_close(matrix(H), whole, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_examples(name: str) -> None:
    model, x, _ = case(name)
    total = WeightedLoss(model, F.cross_entropy, (x, torch.zeros(N, dtype=torch.long)))
    chain = layered.LayeredHessian.of(total)
    assert chain is not None
    directions = torch.randn(N, 3, dtype=torch.float64)
    found = chain.example_gradients(x, directions)
    model.eval()
    for i in range(N):
        value = (model(x[i : i + 1]) * directions[i]).sum()
        wanted = torch.autograd.grad(value, [*model.parameters()])
        torch.testing.assert_close([t[i] for t in found], [*wanted], **CLOSE)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing(smoothing: float) -> None:
    model, x, y = case("mlp")
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
    H = fi.Hessian(model, loss, (x, y))
    assert H.by_hand
    torch.testing.assert_close(matrix(H), dense(model, loss, x, y), **CLOSE)


@pytest.mark.parametrize("kind", [*layers.PIECEWISE_LINEAR, *layers.SMOOTH])
def test_every_activation(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), kind(), nn.Linear(5, 3)).double()
    _, x, y = case("mlp")
    H = fi.Hessian(model, F.cross_entropy, (x, y))
    assert H.by_hand
    torch.testing.assert_close(matrix(H), dense(model, F.cross_entropy, x, y), **CLOSE)


@pytest.mark.parametrize(
    "params", [["0.bias"], ["3.weight"], ["0.weight", "5.bias"], ["3.*", "5.*"], "mask"]
)
def test_selections(params: Any) -> None:
    model, x, y = case("mlp")
    if params == "mask":
        total = sum(p.numel() for p in model.parameters())
        params = torch.rand(total, generator=torch.Generator().manual_seed(0)) < 0.4
    H = fi.Hessian(model, F.cross_entropy, (x, y), params=params)
    assert H.by_hand
    place = H.selection.embed(torch.ones(1, H.dim)).bool()[0]
    wanted = dense(model, F.cross_entropy, x, y)[place][:, place]
    torch.testing.assert_close(matrix(H), wanted, **CLOSE)


@pytest.mark.parametrize("frozen", ["0.", "3.weight", "0.0.bias"])
def test_frozen_parameters(frozen: str) -> None:
    model, x, y = case("cnn" if frozen == "0.0.bias" else "mlp")
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    H = fi.Hessian(model, F.cross_entropy, (x, y))
    assert H.by_hand
    torch.testing.assert_close(matrix(H), dense(model, F.cross_entropy, x, y), **CLOSE)


def test_later_changes_of_the_model_do_not_matter() -> None:
    model, x, y = case("mlp")
    H = fi.Hessian(model, F.cross_entropy, (x, y))
    wanted = matrix(H)
    with torch.no_grad():
        model[0].weight.zero_()
    H.renew()
    torch.testing.assert_close(matrix(H), wanted, rtol=0, atol=0)
    assert model.training


def test_float32_is_as_accurate_as_double_backward() -> None:
    model, x, y = case("cnn")
    wanted = dense(model, F.cross_entropy, x, y)
    H = fi.Hessian(model.float(), F.cross_entropy, (x.float(), y))
    assert H.by_hand
    assert (matrix(H) - wanted).abs().max() < 3e-6 * wanted.abs().max()


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def hooked() -> nn.Module:
    model = mlp()
    model[3].register_forward_hook(lambda module, args, output: output + 1)
    return model


def replaced() -> nn.Module:
    model = mlp()
    model[3].forward = lambda x: 2 * x[:, :4]
    return model


def reparametrized() -> nn.Module:
    model = mlp()
    nn.utils.parametrize.register_parametrization(model[3], "weight", Doubled())
    return model


def with_a_scale() -> nn.Module:
    model = mlp()
    model[0].register_parameter("scale", nn.Parameter(torch.ones(1)))
    return model


@pytest.mark.parametrize(
    "build",
    [
        hooked,
        replaced,
        reparametrized,
        with_a_scale,
        lambda: nn.Sequential(Own(4, 3)),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Hardswish(), nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)),
    ],
)
def test_other_models_go_by_double_backward(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    _, x, y = case("mlp")
    model = build().double()
    H = fi.Hessian(model, F.cross_entropy, (x, y))
    assert not H.by_hand
    torch.testing.assert_close(matrix(H), dense(model, F.cross_entropy, x, y), **CLOSE)


def test_other_losses_go_by_double_backward() -> None:
    model, x, _ = case("mlp")
    y = torch.randn(N, 3).double()
    assert not fi.Hessian(model, F.mse_loss, (x, y)).by_hand


def test_sequences_go_by_double_backward() -> None:
    _, x, y = case("mlp")
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)).double()
    H = fi.Hessian(model, F.cross_entropy, (x.view(N, 2, 2), y))
    assert not H.by_hand
    H @ torch.ones(H.dim, dtype=H.dtype)
