"""Products written out for chains of layers, against dense float64 derivatives."""

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
from fastif_ext.curvature import layered, layers, make_curvature
from fastif_ext.curvature.layers.linear import Linear
from fastif_ext.curvature.outputs import OutputCurvature
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


KINDS = ("hessian", "gauss-newton")


def operator(
    kind: str, model: nn.Module, loss_fn: Any, x: Tensor, y: Tensor, **options: Any
) -> Any:
    """The Hessian or the Gauss-Newton matrix, its products by hand."""
    H = make_curvature(kind, model, loss_fn, (x, y), **options)
    assert H.by_hand
    return H


def dense(
    kind: str, model: nn.Module, loss_fn: Any, x: Tensor, y: Tensor, weights: Tensor | None = None
) -> Tensor:
    """The matrix over all trainable parameters by torch.func."""
    model = copy.deepcopy(model).eval()
    trainable = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in trainable.values()]
    weights = torch.full((len(x),), 1 / len(x), dtype=x.dtype) if weights is None else weights

    def outputs(flat: Tensor) -> Tensor:
        parts = zip(trainable.items(), flat.split(sizes), strict=True)
        return functional_call(model, {k: t.view_as(p) for (k, p), t in parts}, (x,))

    def loss(z: Tensor) -> Tensor:
        each = [loss_fn(z[i : i + 1], y[i : i + 1]) for i in range(len(y))]
        return (torch.stack(each) * weights).sum()

    flat = torch.cat([p.flatten() for p in trainable.values()])
    if kind == "hessian":
        return torch.func.hessian(lambda p: loss(outputs(p)))(flat)
    J = torch.func.jacrev(outputs)(flat).flatten(0, 1)
    B = torch.func.hessian(loss)(outputs(flat)).reshape(len(J), len(J))
    return J.T @ B @ J


def matrix(H: Any) -> Tensor:
    return H @ torch.eye(H.dim, dtype=H.dtype)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_dense(kind: str, name: str, weighted: bool, chunk_size: int | None) -> None:
    model, x, y = case(name)
    weights = torch.rand(N, dtype=torch.float64) if weighted else None
    H = operator(kind, model, F.cross_entropy, x, y, weights=weights, chunk_size=chunk_size)
    A, wanted = matrix(H), dense(kind, model, F.cross_entropy, x, y, weights)
    torch.testing.assert_close(A, wanted, **CLOSE)
    torch.testing.assert_close(H @ torch.ones(H.dim, dtype=H.dtype), wanted.sum(1), **CLOSE)


@pytest.mark.parametrize("name", ["mlp", *IMAGES])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss_fn", [F.mse_loss, nn.SmoothL1Loss(), F.l1_loss])
def test_gauss_newton_of_other_losses(
    loss_fn: Any, weighted: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layered, "BLOCK", 500)  # some rows at a time
    model, x, _ = case(name)
    y = torch.randn(N, 3).double()
    weights = torch.rand(N, dtype=torch.float64) if weighted else None
    G = operator("gauss-newton", model, loss_fn, x, y, weights=weights)
    wanted = dense("gauss-newton", model, loss_fn, x, y, weights)
    assert bool(wanted.any()) == (loss_fn is not F.l1_loss)
    torch.testing.assert_close(matrix(G), wanted, **CLOSE)


@pytest.mark.parametrize("name", ["mlp", "pooled"])
def test_output_hessian(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of one's own in the middle: here for each target another one, not symmetric."""
    monkeypatch.setattr(layered, "BLOCK", 500)
    model, x, y = case(name)
    matrices = torch.randn(3, 3, 3, dtype=torch.float64)

    def middle(outputs: Tensor, targets: Tensor, z: Tensor) -> Tensor:
        scaled = z * outputs.square()
        return torch.einsum("nab,rnb->rna", matrices[targets], scaled)

    G = fi.GaussNewton(model, (x, y), output_hessian=middle)
    assert G.by_hand
    model.eval()
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(o, [*model.parameters()])])
        for i in range(N)
        for o in (model(x[i : i + 1])[0, c] for c in range(3))
    ]
    J = torch.stack(rows).unflatten(0, (N, 3))
    B = matrices[y] * model(x).detach().square()[:, None] / N
    wanted = torch.einsum("nap,nab,nbq->pq", J, B, J)
    torch.testing.assert_close(matrix(G).T, wanted, **CLOSE)  # of its columns the rows


def test_gauss_newton_keeps_less() -> None:
    model, x, y = case("mlp")
    H, G = (operator(kind, model, F.cross_entropy, x, y) for kind in KINDS)
    assert G.graph_bytes < 0.7 * H.graph_bytes


@pytest.mark.parametrize("block", [1, 100, 1000])
@pytest.mark.parametrize("name", ["mlp", *IMAGES])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_rows_change_nothing(
    kind: str, name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = case(name)
    H = operator(kind, model, F.cross_entropy, x, y)
    whole = matrix(H)
    monkeypatch.setattr(layered, "BLOCK", block)
    H.renew()
    torch.testing.assert_close(matrix(H), whole, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_examples(name: str) -> None:
    model, x, _ = case(name)
    total = WeightedLoss(model, F.cross_entropy, (x, torch.zeros(N, dtype=torch.long)))
    chain = layered.LayeredProducts.of(total, OutputCurvature(total.loss_fn))
    assert chain is not None
    directions = torch.randn(N, 3, dtype=torch.float64)
    found = chain.example_gradients(x, directions)
    model.eval()
    for i in range(N):
        value = (model(x[i : i + 1]) * directions[i]).sum()
        wanted = torch.autograd.grad(value, [*model.parameters()])
        torch.testing.assert_close([t[i] for t in found], [*wanted], **CLOSE)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_label_smoothing(kind: str, smoothing: float) -> None:
    model, x, y = case("mlp")
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
    H = operator(kind, model, loss, x, y)
    torch.testing.assert_close(matrix(H), dense(kind, model, loss, x, y), **CLOSE)


@pytest.mark.parametrize("activation", [*layers.PIECEWISE_LINEAR, *layers.SMOOTH])
@pytest.mark.parametrize("kind", KINDS)
def test_every_activation(kind: str, activation: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3)).double()
    _, x, y = case("mlp")
    H = operator(kind, model, F.cross_entropy, x, y)
    torch.testing.assert_close(matrix(H), dense(kind, model, F.cross_entropy, x, y), **CLOSE)


@pytest.mark.parametrize(
    "params", [["0.bias"], ["3.weight"], ["0.weight", "5.bias"], ["3.*", "5.*"], "mask"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_selections(kind: str, params: Any) -> None:
    model, x, y = case("mlp")
    if params == "mask":
        total = sum(p.numel() for p in model.parameters())
        params = torch.rand(total, generator=torch.Generator().manual_seed(0)) < 0.4
    compare_selection(kind, model, x, y, params)


@pytest.mark.parametrize("name", ["cnn", "pooled"])
@pytest.mark.parametrize("kind", KINDS)
def test_selections_of_images(kind: str, name: str) -> None:
    """Of each layer with parameters the first, the last, and both with others around them."""
    model, x, y = case(name)
    for prefix in [k for k, m in model.named_modules() if any(True for _ in m.parameters(False))]:
        names = [f"{prefix}.{k}" for k, _ in model.get_submodule(prefix).named_parameters()]
        top = [k for k, _ in model.named_parameters()][-1]
        for params in (names[:1], names[-1:], [names[0], top], [names[-1], top]):
            compare_selection(kind, model, x, y, params)


def compare_selection(kind: str, model: nn.Module, x: Tensor, y: Tensor, params: Any) -> None:
    """Against dense algebra, also a row at a time; the vectors stay as they were."""
    everything = dense(kind, model, F.cross_entropy, x, y)
    for chunk_size in (None, 1):
        H = operator(kind, model, F.cross_entropy, x, y, params=params, chunk_size=chunk_size)
        place = H.selection.embed(torch.ones(1, H.dim)).bool()[0]
        wanted = everything[place][:, place]
        torch.testing.assert_close(matrix(H), wanted, **CLOSE)
        for shape in ((H.dim,), (1, H.dim), (3, H.dim)):
            v = torch.randn(shape, dtype=H.dtype)
            before = v.clone()
            torch.testing.assert_close(H @ v, v @ wanted, **CLOSE)
            assert torch.equal(v, before)


@pytest.mark.parametrize("frozen", ["0.", "3.weight", "0.0.bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters(kind: str, frozen: str) -> None:
    model, x, y = case("cnn" if frozen == "0.0.bias" else "mlp")
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    H = operator(kind, model, F.cross_entropy, x, y)
    torch.testing.assert_close(matrix(H), dense(kind, model, F.cross_entropy, x, y), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_later_changes_of_the_model_do_not_matter(kind: str) -> None:
    model, x, y = case("mlp")
    H = operator(kind, model, F.cross_entropy, x, y)
    wanted = matrix(H)
    with torch.no_grad():
        model[0].weight.zero_()
    H.renew()
    torch.testing.assert_close(matrix(H), wanted, rtol=0, atol=0)
    assert model.training


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_accurate_as_torch(kind: str) -> None:
    model, x, y = case("cnn")
    wanted = dense(kind, model, F.cross_entropy, x, y)
    H = operator(kind, model.float(), F.cross_entropy, x.float(), y)
    assert (matrix(H) - wanted).abs().max() < 3e-6 * wanted.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_what_disagrees_with_torch_is_not_taken(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = case("mlp")
    monkeypatch.setattr(Linear, "pull", lambda self, job, kept, memory, back: 2 * back @ job.own)
    H = make_curvature(kind, model, F.cross_entropy, (x, y))
    assert not H.by_hand
    torch.testing.assert_close(matrix(H), dense(kind, model, F.cross_entropy, x, y), **CLOSE)


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
@pytest.mark.parametrize("kind", KINDS)
def test_other_models_go_by_torch(kind: str, build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    _, x, y = case("mlp")
    model = build().double()
    H = make_curvature(kind, model, F.cross_entropy, (x, y))
    assert not H.by_hand
    torch.testing.assert_close(matrix(H), dense(kind, model, F.cross_entropy, x, y), **CLOSE)


def test_hessians_of_other_losses_go_by_double_backward() -> None:
    model, x, _ = case("mlp")
    y = torch.randn(N, 3).double()
    assert not fi.Hessian(model, F.mse_loss, (x, y)).by_hand


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_go_by_torch(kind: str) -> None:
    _, x, y = case("mlp")
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)).double()
    H = make_curvature(kind, model, F.cross_entropy, (x.view(N, 2, 2), y))
    assert not H.by_hand
    H @ torch.ones(H.dim, dtype=H.dtype)
