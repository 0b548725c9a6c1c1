"""Scores against dense algebra and against true leave-one-out retraining."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastif_ext as fi
from fastif_ext import directional, products
from fastif_ext.directional import DirectionalDerivatives
from fastif_ext.example_runs import ByExample
from fastif_ext.layer_runs import Hooked
from fastif_ext.layerwise import Layers
from fastif_ext.objective import WeightedLoss
from fastif_ext.parameters import Selection
from fastif_ext.training import train_lbfgs

pytestmark = pytest.mark.usefixtures("one_thread")

DOUBLE = torch.float64
N, T = 23, 7


class Conv(nn.Module):
    """Strides, padding of two kinds, dilation, in-place ReLU, batch norm and dropout between."""

    def __init__(self, affine: bool = False) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 3, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(3, affine=affine)
        self.relu = nn.ReLU(inplace=True)
        self.b = nn.Conv2d(3, 2, 2, padding="same", padding_mode="circular", dilation=2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(18, 3)
        self.norm.running_mean.uniform_(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.a(x)))
        return self.head(self.drop(self.relu(self.b(x))).flatten(1))


class Tied(nn.Module):
    """One weight in two layers; one of the layers called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))


class Loose(nn.Module):
    """A layer's weight used outside of it: what hooks cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(x @ self.layer.weight))


class Residual(nn.Module):
    """Convolutions in groups and group norm around a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 4, 3, padding="same", padding_mode="reflect")
        self.norm = nn.GroupNorm(2, 4)
        self.b = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.again = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        for norm in (self.norm, self.again):
            nn.init.normal_(norm.weight)
        self.again.running_mean.uniform_(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).relu_()
        return self.head(self.again(x + self.b(x)).relu().mean((2, 3)))


class Text(nn.Module):
    """Tables, one with a row for padding, attention, norms over one axis and over two."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(7, 4, padding_idx=2), nn.Embedding(9, 4)
        self.first = nn.LayerNorm((5, 4))
        self.mix = nn.Linear(4, 12)
        self.second = nn.RMSNorm(4)
        self.head = nn.Linear(4, 3)
        nn.init.normal_(self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])[None]  # broadcast
        x = self.first(input=self.table(input=x) + self.places(places))
        q, k, v = self.mix(x).chunk(3, -1)
        return self.head(self.second(x + F.scaled_dot_product_attention(q, k, v)).mean(1))


class Tokens(nn.Module):
    """Embedding, attention and layer norm around linear layers on sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


class Signal(nn.Module):
    """Convolutions along one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2)
        self.b = nn.Conv1d(4, 4, 2, padding="same", padding_mode="circular", groups=2)
        self.c = nn.Conv1d(4, 2, 3, padding=1, padding_mode="reflect", bias=False)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(torch.tanh(self.b(torch.tanh(self.a(x))))).tanh().mean(2))


class Language(nn.Module):
    """The next word's logits; places are looked up once, words go out by the table they came by."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(7, 4), nn.Embedding(6, 4)
        self.first, self.mix, self.drop = nn.LayerNorm(4), nn.Linear(4, 12), nn.Dropout(0.1)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.table(x) + self.places(torch.arange(x.shape[1])))
        q, k, v = self.mix(self.first(x)).chunk(3, -1)
        return self.head(x + F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Patches(nn.Module):
    """A class token and places of no layer, attention of PyTorch's own, a scale for all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 4, 3, stride=3)
        self.token, self.places = (
            nn.Parameter(torch.randn(1, 1, 4)),
            nn.Parameter(torch.randn(5, 4)),
        )
        self.attention, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        x = x + self.scale * self.attention(self.norm(x), x, x, need_weights=False)[0]
        return self.head(x[:, 0])


class Frames(nn.Module):
    """Pictures of a film as rows of the batch, which layers with channels see."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.group = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.GroupNorm(2, 2)
        self.b, self.mix = nn.Conv1d(2, 2, 1), nn.Linear(2, 3)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        x = self.group(torch.tanh(self.norm(self.a(x.flatten(0, 1)))))
        x = self.mix(torch.tanh(self.b(x.flatten(2))).mean(2))
        return torch.tanh(x).view(n, -1, 3).mean(1)


class Asking(nn.Module):
    """A parameter of no layer, and a look at the inputs that decides what is done."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(3, 3), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(x + self.shift) if x.abs().max() < 1e9 else x)


def next_words(outputs: Tensor, words: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), words.flatten())


def case(name: str) -> tuple[nn.Module, Callable[..., Tensor], Tensor, Tensor]:
    torch.manual_seed(3)
    n = N + T
    x, y = torch.randn(n, 3, dtype=DOUBLE), torch.randint(3, (n,))
    loss: Callable[..., Tensor] = F.cross_entropy
    if name == "softmax":
        model: nn.Module = nn.Linear(3, 3)
    elif name == "mlp":
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    elif name == "regression":
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))
        loss, y = F.mse_loss, torch.randn(n, 2, dtype=DOUBLE)
    elif name.startswith("conv"):
        model, x = Conv(affine=name != "conv"), torch.randn(n, 1, 6, 6, dtype=DOUBLE)
    elif name == "chain":
        again = nn.Conv2d(2, 2, 3, padding=1)
        below, above = nn.Conv2d(1, 2, 3, stride=2, padding=2, dilation=2), nn.Linear(18, 3)
        model = nn.Sequential(
            below, nn.ReLU(inplace=True), again, nn.Tanh(), again, nn.Flatten(), above
        )
        loss, x = nn.CrossEntropyLoss(label_smoothing=0.1), torch.randn(n, 1, 6, 6, dtype=DOUBLE)
    elif name == "normalized":
        model = nn.Sequential(
            nn.BatchNorm2d(1),
            nn.Conv2d(1, 2, 3),
            nn.BatchNorm2d(2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.BatchNorm1d(8),
            nn.Linear(8, 3),
        )
        for i in (0, 2, 6):
            nn.init.normal_(model[i].weight)
            model[i].running_mean.uniform_(-1, 1)
        x = torch.randn(n, 1, 6, 6, dtype=DOUBLE)
    elif name == "residual":
        model, x = Residual(), torch.randn(n, 1, 6, 6, dtype=DOUBLE)
    elif name == "tied":
        model = Tied()
    elif name == "loose":
        model = Loose()
    elif name == "signal":
        model, x = Signal(), torch.randn(n, 2, 9, dtype=DOUBLE)
    elif name == "language":
        x = torch.randint(7, (n, 6))
        model, loss, x, y = Language(), next_words, x[:, :5], x[:, 1:]
    elif name == "patches":
        model, x = Patches(), torch.randn(n, 1, 6, 6, dtype=DOUBLE)
    elif name == "frames":
        model, x = Frames(), torch.randn(n, 2, 1, 4, 4, dtype=DOUBLE)
        loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    elif name == "asking":
        model = Asking()
    else:
        model, x = Tokens() if name == "tokens" else Text(), torch.randint(7, (n, 5))
    return model.double().train(), loss, x, y


CASES = [
    "softmax",
    "mlp",
    "regression",
    "conv",
    "conv-affine",
    "chain",
    "normalized",
    "residual",
    "text",
    "signal",
    "tied",
    "loose",
    "tokens",
    "language",
    "patches",
    "frames",
    "asking",
]
OUTSIDE = {
    "tokens": ["layer.self_attn.*"],
    "language": [],
    "patches": ["token", "places", "scale", "attention.*"],
    "frames": [],
}
"""Networks that whole batches do not go through layer by layer: parameters outside of layers."""


def gradients(model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Each example's gradient, [n, p]."""
    model = copy.deepcopy(model).eval()
    torch.backends.mha.set_fastpath_enabled(False)
    rows = []
    for i in range(len(y)):
        grads = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), model.parameters())
        rows.append(torch.cat([g.flatten() for g in grads]))
    torch.backends.mha.set_fastpath_enabled(True)
    return torch.stack(rows)


def split(x: Tensor, y: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (x[:N], y[:N]), (x[N:], y[N:])


class TestDirectionalDerivatives:
    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("count", [1, 9])
    def test_every_way_gives_the_gradients_products(self, name: str, count: int) -> None:
        model, loss, x, y = case(name)
        total = WeightedLoss(model, loss, (x, y))
        v = torch.randn(count, total.selection.dim, dtype=DOUBLE)
        directions = total.selection.split(v)
        want = v @ gradients(model, loss, x, y).T
        options = {"rtol": 1e-8, "atol": 1e-10}
        torch.testing.assert_close(
            directional.forward_mode(total, x, y, directions), want, **options
        )
        chosen = directional.DirectionalDerivatives(total)(x, y, directions)
        torch.testing.assert_close(chosen, want, **options)
        layers = Layers.of(total)
        assert (layers is None) == (name in ("tokens", "patches", "asking"))
        if layers is not None:
            found = layers.derivatives(x, y, directions)
            if name in OUTSIDE:  # rows of examples and of other things
                assert found is None
            else:
                assert torch.allclose(found, want, **options) == (name != "loose")
        if name != "asking":
            found = Layers.by_example(total).derivatives(x, y, directions)
            assert torch.allclose(found, want, **options) == (name != "loose")
        assert all(m.training for m in model.modules())
        assert not any(m._forward_hooks for m in model.modules())

    @pytest.mark.parametrize("name", CASES)
    def test_rows_of_a_pass(self, name: str) -> None:
        """More rows for a small network, within limits."""
        model, loss, x, y = case(name)
        chosen = directional.DirectionalDerivatives(WeightedLoss(model, loss, (x, y)))
        if name == "asking":
            assert chosen.layers is None
            assert chosen.rows() == 512
            return
        assert chosen.layers is not None
        most = directional.IN_FLIGHT // chosen.layers.numbers_per_row
        if chosen.layers.gradient_per_row:
            assert name in OUTSIDE or name == "loose"
            assert chosen.rows() == 512
            chosen.layers.gradient_per_row = directional.GRADIENTS // 5
            assert chosen.rows() == 5
            chosen.layers.gradient_per_row *= 10
            assert chosen.rows() == 1
            return
        assert chosen.rows() == min(8192, most)
        assert most > 4096
        if name == "mlp":  # 3 outputs after a hidden layer
            width = sum(m.out_features for m in model.modules() if isinstance(m, nn.Linear))
            assert chosen.layers.numbers_per_row == width
        chosen.layers.numbers_per_row = 10**6
        assert chosen.rows() == 32

    @pytest.mark.parametrize("name", OUTSIDE)
    def test_parameters_outside_of_layers(self, name: str) -> None:
        """They alone get gradients; whichever are selected, whatever else has its own."""
        model, loss, x, y = case(name)
        whole = WeightedLoss(model, loss, (x, y))
        outside = Selection(model, OUTSIDE[name]) if OUTSIDE[name] else None
        layers = DirectionalDerivatives(whole).layers
        assert layers is not None
        assert isinstance(layers._run, ByExample)
        assert layers.gradient_per_row == (0 if outside is None else outside.dim)
        g = gradients(model, loss, x, y)
        inside = [k for k in whole.leaves if outside is None or k not in outside.touched]
        some = torch.rand(g.shape[1]) < 0.5
        for params in (inside[::2], [inside[0], *OUTSIDE[name][:1]], OUTSIDE[name] or inside, some):
            total = WeightedLoss(model, loss, (x, y), params=params)
            v = torch.randn(4, total.selection.dim, dtype=DOUBLE)
            derivatives = DirectionalDerivatives(total)
            assert derivatives.layers is not None
            got = derivatives(x, y, total.selection.split(v))
            torch.testing.assert_close(got, v @ total.selection.restrict(g).T)

    def test_a_weight_used_outside_of_its_layer_gets_gradients(self) -> None:
        model, loss, x, y = case("loose")
        layers = DirectionalDerivatives(WeightedLoss(model, loss, (x, y))).layers
        assert layers is not None
        assert layers.gradient_per_row == 9  # and not the 3 of the bias

    def test_sequences_of_several_lengths(self) -> None:
        model, loss, x, y = case("language")
        total = WeightedLoss(model, loss, (x, y))
        derivatives = DirectionalDerivatives(total)
        v = torch.randn(2, total.selection.dim, dtype=DOUBLE)
        for length in (5, 3, 4):
            few = x[:, :length], y[:, :length]
            got = derivatives(*few, total.selection.split(v))
            torch.testing.assert_close(got, v @ gradients(model, loss, *few).T)

    @pytest.mark.parametrize("flat", ["view", "flatten"])
    def test_images_in_the_order_a_model_takes(self, flat: str) -> None:
        class Viewing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.head = nn.Conv2d(2, 3, 3), nn.Linear(48, 3)

            def forward(self, x: Tensor) -> Tensor:
                x = torch.tanh(self.a(x))
                return self.head(x.view(-1, 48) if flat == "view" else x.flatten(1))

        torch.manual_seed(0)
        model, y = Viewing().double(), torch.randint(3, (9,))
        x = torch.randn(9, 2, 6, 6, dtype=DOUBLE)
        total = WeightedLoss(model, F.cross_entropy, (x, y))
        found = DirectionalDerivatives(total)
        v = torch.randn(4, total.selection.dim, dtype=DOUBLE)
        want = v @ gradients(model, F.cross_entropy, x, y).T
        torch.testing.assert_close(found(x, y, total.selection.split(v)), want)
        assert found.layers is not None
        run = found.layers._run
        assert isinstance(run, Hooked)
        assert run._channels_last == (flat == "flatten")

    def test_gradients_a_few_rows_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, loss, x, y = case("conv")
        total = WeightedLoss(model, loss, (x, y))
        layers = Layers.of(total)
        assert layers is not None
        directions = total.selection.split(torch.randn(9, total.selection.dim, dtype=DOUBLE))
        want = layers.derivatives(x, y, directions)
        monkeypatch.setattr(products, "BLOCK", 500)
        torch.testing.assert_close(layers.derivatives(x, y, directions), want)

    def test_sequences_through_linear_layers(self) -> None:
        """Several places per example, few and many directions."""
        torch.manual_seed(0)

        class Mean(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(torch.tanh(self.layer(x))).mean(1)

        model = Mean().double()
        x, y = torch.randn(6, 5, 3, dtype=DOUBLE), torch.randint(3, (6,))
        total = WeightedLoss(model, F.cross_entropy, (x, y))
        layers = Layers.of(total)
        assert layers is not None
        for count in (2, 7):
            v = torch.randn(count, total.selection.dim, dtype=DOUBLE)
            got = layers.derivatives(x, y, total.selection.split(v))
            torch.testing.assert_close(got, v @ gradients(model, F.cross_entropy, x, y).T)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunks", [(64, 256), (3, 5)])
def test_equals_dense_algebra(name: str, chunks: tuple[int, int]) -> None:
    model, loss, x, y = case(name)
    train, test = split(x, y)
    H = fi.GaussNewton(model, train, loss_fn=loss) @ torch.eye(
        sum(p.numel() for p in model.parameters()), dtype=DOUBLE
    )
    A = H + 0.1 * torch.eye(len(H), dtype=DOUBLE)
    want = gradients(model, loss, *test) @ torch.linalg.solve(A, gradients(model, loss, *train).T)
    got = fi.influence_scores(
        model, loss, train, test, curvature="gauss-newton", damping=0.1, tol=1e-11,
        test_chunk=chunks[0], train_chunk=chunks[1],
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    own = fi.self_influence(
        model, loss, train, curvature="gauss-newton", damping=0.1, tol=1e-11, chunk=chunks[1]
    )
    g = gradients(model, loss, *train)
    torch.testing.assert_close(own, (torch.linalg.solve(A, g.T).T * g).sum(1), rtol=1e-6, atol=1e-9)
    assert own.min() >= 0


class TestOptions:
    def test_indefinite_hessian_with_enough_damping(self) -> None:
        model, loss, x, y = case("mlp")
        train, test = split(x, y)
        H = fi.Hessian(model, loss, train) @ torch.eye(31, dtype=DOUBLE)
        damping = 0.01 - 2 * float(torch.linalg.eigvalsh(H)[0])
        A = H + damping * torch.eye(31, dtype=DOUBLE)
        want = gradients(model, loss, *test) @ torch.linalg.solve(
            A, gradients(model, loss, *train).T
        )
        for solver in ("cg", "lissa", "exact"):
            got = fi.influence_scores(
                model, loss, train, test, solver=solver, damping=damping, tol=1e-9,
                max_iter=None if solver == "exact" else 20_000,
            )  # fmt: skip
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        with pytest.raises(fi.SolverDivergence):
            fi.influence_scores(model, loss, train, test, damping=0.0)

    def test_selection_sampler_and_kinds_of_data(self) -> None:
        model, loss, x, y = case("mlp")
        train, test = split(x, y)
        mask = torch.rand(31) < 0.5
        sampler = SimpleNamespace(
            indices=torch.tensor([0, 4, 4, 11]), weights=torch.tensor([0.5, 0.1, 0.2, 0.4])
        )
        rows = fi.data.take(train, sampler.indices)
        H = fi.GaussNewton(model, rows, weights=sampler.weights, params=mask)
        A = H @ torch.eye(H.dim, dtype=DOUBLE) + 0.2 * torch.eye(H.dim, dtype=DOUBLE)
        g_test, g_train = (gradients(model, loss, *d)[:, mask] for d in (test, train))
        want = g_test @ torch.linalg.solve(A, g_train.T)
        options: dict[str, Any] = {"params": mask, "damping": 0.2, "tol": 1e-11}
        for kind in (lambda d: d, lambda d: TensorDataset(*d)):
            got = fi.influence_scores(
                model, loss, kind(train), kind(test), sampler=sampler, curvature="gauss-newton",
                **options,
            )  # fmt: skip
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
        loaders = (DataLoader(TensorDataset(*d), 4) for d in (train, test))
        got = fi.influence_scores(model, loss, *loaders, curvature=H, **options)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
        chosen = torch.tensor([5, 2])
        own = fi.self_influence(
            model, loss, train, rows=chosen, sampler=sampler, curvature="gauss-newton", **options
        )
        g = g_train[chosen]
        torch.testing.assert_close(own, (torch.linalg.solve(A, g.T).T * g).sum(1))

    def test_last_layer(self) -> None:
        model, loss, x, y = case("mlp")
        train, test = split(x, y)
        options: dict[str, Any] = {"damping": 0.1, "tol": 1e-11}
        want = fi.influence_scores(model, loss, train, test, params=model[2], **options)
        got = fi.influence_scores(model, loss, train, test, curvature="linear-softmax", **options)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)

    def test_automatic_damping_is_one_for_all(self) -> None:
        model, loss, x, y = case("softmax")
        train, test = split(x, y)
        a = fi.influence_scores(model, loss, train, test, tol=1e-10)
        b = fi.influence_scores(model, loss, train, test, tol=1e-10, test_chunk=2)
        torch.testing.assert_close(a, b)


def test_leave_one_out_retraining() -> None:
    """Logistic regression: ranks and signs of the scores are those of true retraining."""
    torch.manual_seed(0)
    n, l2 = 80, 0.02
    y = torch.arange(n + 6) % 3
    x = torch.randn(3, 4, dtype=DOUBLE)[y] + 1.2 * torch.randn(n + 6, 4, dtype=DOUBLE)
    model = nn.Linear(4, 3, dtype=DOUBLE)
    train_lbfgs(model, x[:n], y[:n], l2=l2)
    scores = fi.influence_scores(
        model, F.cross_entropy, (x[:n], y[:n]), (x[n:], y[n:]), damping=l2, tol=1e-9
    )

    def test_losses(net: nn.Module) -> Tensor:
        with torch.no_grad():
            return F.cross_entropy(net(x[n:]), y[n:], reduction="none")

    changes = []
    for i in range(n):
        kept = torch.arange(n) != i
        net = copy.deepcopy(model)
        # the sum over the n - 1 rows that stay, over n, with the same decay
        train_lbfgs(net, x[:n][kept], y[:n][kept], l2=l2 * n / (n - 1))
        changes.append(test_losses(net) - test_losses(model))
    true = torch.stack(changes, 1)
    for t in range(6):
        ranks = torch.stack([v.argsort().argsort().double() for v in (scores[t], true[t])])
        assert float(torch.corrcoef(ranks)[0, 1]) > 0.98
        sizes = float((scores[t] / n).norm() / true[t].norm())
        assert 0.85 < sizes < 1.1
        large = true[t].abs() > true[t].abs().median()
        assert torch.equal(scores[t][large].sign(), true[t][large].sign())


def test_dict_inputs_and_a_parameter_outside_of_layers() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(4, 3), nn.Linear(3, 3)
            self.mix = nn.Parameter(torch.randn(3, 3))

        def forward(self, *, words: Tensor, mask: Tensor) -> Tensor:
            x = torch.tanh(self.table(words) @ self.mix) * mask[..., None]
            return self.head(x.sum(1))

    torch.manual_seed(1)
    model, words, y = Named().double(), torch.randint(4, (N, 5)), torch.randint(3, (N,))
    mask = (torch.rand(N, 5) < 0.7).double()
    data = {"words": words, "mask": mask}, y
    total = WeightedLoss(model, F.cross_entropy, data)
    derivatives = DirectionalDerivatives(total)
    assert derivatives.layers is not None
    v = torch.randn(3, total.selection.dim, dtype=DOUBLE)
    want = []
    for i in range(N):
        loss = F.cross_entropy(model(words=words[i, None], mask=mask[i, None]), y[i, None])
        g = dict(zip(total.leaves, torch.autograd.grad(loss, model.parameters()), strict=True))
        want.append(v @ torch.cat([t.flatten() for t in g.values()]))
    got = derivatives(*data, total.selection.split(v))
    torch.testing.assert_close(got, torch.stack(want, 1))


def test_dict_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3, dtype=DOUBLE)

        def forward(self, *, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(torch.tanh(a + b))

    torch.manual_seed(1)
    model, y = Named(), torch.randint(3, (N,))
    a, b = torch.randn(2, N, 3, dtype=DOUBLE)
    data = {"a": a, "b": b}, y
    got = fi.influence_scores(model, F.cross_entropy, data, data, damping=0.1, tol=1e-10)
    plain = torch.tanh(a + b), y
    want = fi.influence_scores(model.layer, F.cross_entropy, plain, plain, damping=0.1, tol=1e-10)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got, got.T)


@pytest.mark.parametrize("name", ["conv", "patches"])
def test_nothing_is_changed(name: str) -> None:
    model, loss, x, y = case(name)
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    train, test = split(x, y)
    fi.influence_scores(model, loss, train, test, damping=5.0)
    fi.self_influence(model, loss, train, damping=5.0)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("name", ["softmax", "conv", "patches"])
def test_labels_that_are_ignored_and_labels_that_are_wrong(name: str) -> None:
    model, loss, x, y = case(name)
    total = WeightedLoss(model, loss, (x, y))
    derivatives = DirectionalDerivatives(total)
    directions = total.selection.split(torch.ones(1, total.selection.dim, dtype=DOUBLE))
    plain, y = derivatives(x, y, directions), y.clone()
    y[4] = -100
    got = derivatives(x, y, directions)
    assert not got[0, 4].any()
    y[4] = 0
    assert derivatives(x, y, directions)[0, 4] != 0
    torch.testing.assert_close(got[:, :4], plain[:, :4])
    for label in (-1, 3):
        y[4] = label
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            derivatives(x, y, directions)


def test_bad_input() -> None:
    model, loss, x, y = case("softmax")
    train, test = split(x, y)
    scores = fi.influence_scores
    with pytest.raises(ValueError, match="chunk sizes must be at least 1, got 0"):
        scores(model, loss, train, test, train_chunk=0)
    with pytest.raises(ValueError, match="solver must be one of .* got 'lu'"):
        scores(model, loss, train, test, solver="lu")
    with pytest.raises(ValueError, match="curvature must be one of .* got 'fisher'"):
        scores(model, loss, train, test, curvature="fisher")
    H = fi.Hessian(model, loss, train)
    with pytest.raises(ValueError, match="sampler would not be used"):
        scores(model, loss, train, test, curvature=H, sampler=fi.RandomSampler(N, 5))
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 23\)"):
        fi.self_influence(model, loss, train, rows=torch.tensor([23]))
    with pytest.raises(ValueError, match=r"sampler.indices must lie in \[0, 23\)"):
        scores(model, loss, train, test, sampler=fi.RandomSampler(50, 40))

    def detached(out: Tensor, target: Tensor) -> Tensor:
        return loss(out.detach(), target)

    with pytest.raises(ValueError, match="does not depend on the selected parameters"):
        scores(model, detached, train, test, damping=1.0)
