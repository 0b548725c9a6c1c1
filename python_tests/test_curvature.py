"""The Hessian operator against dense float64 Hessians, and what it must leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fastif_ext as fi

DOUBLE = torch.float64
N = 23


def dense(
    model: nn.Module, loss_fn: Callable[[Any, Tensor], Tensor], x: Any, y: Tensor, w: Tensor | None
) -> Tensor:
    """The Hessian of sum_i w_i loss_i over all trainable parameters, by torch.func."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    names, shapes = list(params), [p.shape for p in params.values()]
    weights = torch.full((len(y),), 1 / len(y), dtype=DOUBLE) if w is None else w

    def total(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        own = {k: v.view(s) for k, v, s in zip(names, parts, shapes, strict=True)}
        result = flat.new_zeros(())
        for i in range(len(y)):
            if isinstance(x, dict):
                one = {k: v[i : i + 1] for k, v in x.items()}
                out = torch.func.functional_call(model, own, (), one)
            else:
                out = torch.func.functional_call(model, own, (x[i : i + 1],))
            result = result + weights[i] * loss_fn(out, y[i : i + 1])
        return result

    return torch.func.hessian(total)(torch.cat([p.flatten() for p in params.values()]))


class Tied(nn.Module):
    """One weight used twice, one frozen, one that the loss never sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(4, 3)
        self.frozen.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(torch.tanh(self.second(torch.tanh(self.first(x)))))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, *, x: Tensor, shift: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) + shift[:, None]) * 3


def case(name: str) -> tuple[nn.Module, Callable[[Any, Tensor], Tensor], Any, Tensor]:
    torch.manual_seed(1)
    x: Any = torch.randn(N, 4, dtype=DOUBLE)
    y = torch.randint(3, (N,))
    loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy
    model: nn.Module
    if name == "linear regression":
        model, y, loss = nn.Linear(4, 2), torch.randn(N, 2, dtype=DOUBLE), F.mse_loss
    elif name == "softmax regression":
        model, loss = nn.Linear(4, 3), nn.CrossEntropyLoss()
    elif name == "tanh mlp":
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    elif name == "custom loss":
        model = nn.Sequential(nn.Linear(4, 3), nn.Softplus())
        loss = lambda out, target: (out.gather(1, target[:, None]) ** 3).mean()  # noqa: E731
    elif name == "conv":
        x = torch.randn(N, 1, 5, 5, dtype=DOUBLE)
        model = nn.Sequential(
            nn.Conv2d(1, 2, 3),
            nn.BatchNorm2d(2),
            nn.Tanh(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(18, 3),
        )
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    elif name == "tied":
        model = Tied()
    elif name == "dict":
        model, x = TwoInputs(), {"x": x, "shift": torch.randn(N, dtype=DOUBLE)}
    else:
        raise AssertionError(name)
    return model.to(DOUBLE), loss, x, y


CASES = [
    "linear regression",
    "softmax regression",
    "tanh mlp",
    "custom loss",
    "conv",
    "tied",
    "dict",
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", CASES)
class TestAgainstDense:
    def test_products(self, name: str, weighted: bool) -> None:
        model, loss, x, y = case(name)
        w = torch.rand(N, dtype=DOUBLE) if weighted else None
        model.eval()
        H = dense(model, loss, x, y, w)
        model.train()
        operator = fi.Hessian(model, loss, (x, y), weights=w)
        assert operator.dim == len(H)
        v = torch.randn(5, len(H), dtype=DOUBLE)
        torch.testing.assert_close(operator @ v, v @ H)
        torch.testing.assert_close(operator @ v[0], H @ v[0])
        torch.testing.assert_close(operator @ v[:1], v[:1] @ H)

    def test_chunks_and_rebuilt_graphs(self, name: str, weighted: bool) -> None:
        model, loss, x, y = case(name)
        w = torch.rand(N, dtype=DOUBLE) if weighted else None
        whole = fi.Hessian(model, loss, (x, y), weights=w)
        v = torch.randn(2, whole.dim, dtype=DOUBLE)
        want = whole @ v
        for options in ({"chunk_size": 1}, {"chunk_size": 7}, {"graph_memory": 0}):
            torch.testing.assert_close(
                fi.Hessian(model, loss, (x, y), weights=w, **options) @ v, want
            )
        assert whole.cached
        assert not fi.Hessian(model, loss, (x, y), graph_memory=0).cached


def test_parameter_lists_are_what_lissa_update_reads() -> None:
    model, loss, x, y = case("tanh mlp")
    H = fi.Hessian(model, loss, (x, y))
    v = torch.randn(3, H.dim, dtype=DOUBLE)
    products = H.products(v)
    assert [p.shape[1:] for p in products] == [p.shape for p in model.parameters()]
    torch.testing.assert_close(torch.cat([p.flatten(1) for p in products], 1), H @ v)
    named = H.unflatten(v[0])
    assert list(named) == [k for k, _ in model.named_parameters()]
    torch.testing.assert_close(torch.cat([t.flatten() for t in named.values()]), v[0])


class TestData:
    @pytest.fixture
    def setting(self) -> tuple[nn.Module, TensorDataset, Tensor]:
        model, _, x, y = case("tanh mlp")
        return model, TensorDataset(x, y), dense(model, F.cross_entropy, x, y, None)

    def test_sources(self, setting: tuple[nn.Module, TensorDataset, Tensor]) -> None:
        model, data, H = setting

        class Rows(Dataset[tuple[Tensor, int]]):
            def __len__(self) -> int:
                return N

            def __getitem__(self, i: int) -> tuple[Tensor, int]:
                return data.tensors[0][i], int(data.tensors[1][i])

        v = torch.randn(2, len(H), dtype=DOUBLE)
        rng = torch.get_rng_state()
        shuffled = DataLoader(data, batch_size=5, shuffle=True)  # ragged: 5, 5, 5, 5, 3
        for source in (data.tensors, data, Rows(), DataLoader(data, batch_size=5), shuffled):
            H_source = fi.Hessian(model, F.cross_entropy, source)
            torch.testing.assert_close(H_source @ v, v @ H)
            assert torch.equal(H_source @ v, H_source @ v)  # read once: a fixed operator
        assert torch.equal(torch.get_rng_state(), rng)

    def test_repeated_rows_and_horvitz_thompson_weights(
        self, setting: tuple[nn.Module, TensorDataset, Tensor]
    ) -> None:
        model, data, _ = setting
        x, y = data.tensors
        rows = torch.tensor([3, 3, 0, 11])
        w = torch.tensor([0.5, 0.1, 1.0, 0.2])
        total = torch.zeros(N, dtype=DOUBLE).index_add_(0, rows, w.double())
        H = dense(model, F.cross_entropy, x, y, total)
        v = torch.randn(len(H), dtype=DOUBLE)
        got = fi.Hessian(model, F.cross_entropy, (x[rows], y[rows]), weights=w) @ v
        torch.testing.assert_close(got, H @ v, rtol=1e-6, atol=1e-7)


class TestSelection:
    def test_blocks_of_the_dense_hessian(self) -> None:
        model, loss, x, y = case("tanh mlp")
        H = dense(model, loss, x, y, None)
        place = torch.zeros(len(H), dtype=torch.bool)
        place[25:] = True  # the second layer
        mask = torch.rand(len(H)) < 0.3
        for params, where in (
            (["2.weight", "2.bias"], place),
            (["2.*"], place),
            (model[2], place),
            (place, place),
            (mask, mask),
        ):
            part = fi.Hessian(model, loss, (x, y), params=params)
            v = torch.randn(3, int(where.sum()), dtype=DOUBLE)
            torch.testing.assert_close(part @ v, v @ H[where][:, where])
            torch.testing.assert_close(part.selection.embed(v)[:, where], v)
            assert part.selection.embed(v)[:, ~where].abs().max() == 0

    def test_bad_selections(self) -> None:
        model, loss, x, y = case("tanh mlp")
        for params, message in (
            (["3.*"], r"'3.\*' matches no trainable parameter; there are: 0.weight, 0.bias"),
            ("0.weight", "list of names or patterns, got the str '0.weight'"),
            (torch.ones(3, dtype=torch.bool), "mask must be bool of length 43"),
            (torch.zeros(43, dtype=torch.bool), "selects no trainable parameter"),
            (nn.Linear(2, 2), "selects no trainable parameter"),
        ):
            with pytest.raises((ValueError, TypeError), match=message):
                fi.Hessian(model, loss, (x, y), params=params)
        with pytest.raises(ValueError, match="no parameter with requires_grad"):
            fi.Hessian(model.requires_grad_(False), loss, (x, y))


class TestLeavesThingsAlone:
    @pytest.mark.parametrize("breaks", [False, True])
    def test_model_and_rng(self, breaks: bool) -> None:
        model, loss, x, y = case("conv")
        model.train()
        model[1].eval()
        before = copy.deepcopy(model.state_dict())
        flags, rng = [m.training for m in model.modules()], torch.get_rng_state()
        if breaks:
            with pytest.raises(RuntimeError):
                fi.Hessian(model, loss, (x[:, :, :3], y))
        else:
            H = fi.Hessian(model, loss, (x, y))
            _ = H @ torch.randn(2, H.dim, dtype=DOUBLE, generator=torch.Generator())
        assert [m.training for m in model.modules()] == flags
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert torch.equal(torch.get_rng_state(), rng)

    def test_later_training_does_not_change_the_operator(self) -> None:
        model, loss, x, y = case("softmax regression")
        H = fi.Hessian(model, loss, (x, y), graph_memory=0)
        v = torch.randn(H.dim, dtype=DOUBLE)
        want = H @ v
        with torch.no_grad():
            model.weight.add_(1)
        torch.testing.assert_close(H @ v, want)

    def test_works_under_no_grad(self) -> None:
        model, loss, x, y = case("softmax regression")
        v = torch.randn(15, dtype=DOUBLE)
        want = fi.Hessian(model, loss, (x, y)) @ v
        with torch.no_grad():
            torch.testing.assert_close(fi.Hessian(model, loss, (x, y)) @ v, want)


def test_graph_bytes_are_about_right() -> None:
    """Twice the hidden width, about twice the bytes; of the order of the activations."""
    x, y = torch.randn(256, 16), torch.randint(4, (256,))

    def graph_bytes(hidden: int) -> int:
        model = nn.Sequential(nn.Linear(16, hidden), nn.Tanh(), nn.Linear(hidden, 4))
        return fi.Hessian(model, F.cross_entropy, (x, y)).graph_bytes

    small, large = graph_bytes(200), graph_bytes(400)
    assert 1.5 < large / small < 2.5
    assert 256 * 200 * 4 < small < 20 * 256 * 200 * 4


def test_linear_loss_has_zero_hessian() -> None:
    model = nn.Linear(4, 2, bias=False)
    H = fi.Hessian(model, lambda out, t: (out - t).mean(), (torch.randn(6, 4), torch.zeros(6, 2)))
    assert torch.equal(H @ torch.ones(2, 8), torch.zeros(2, 8))


def test_mean_gradient_equals_autograd() -> None:
    for name in CASES:
        model, loss, x, y = case(name)
        model.eval()
        out = model(**x) if isinstance(x, dict) else model(x)
        own = [p for p in model.parameters() if p.requires_grad]
        g = torch.autograd.grad(loss(out, y), own, materialize_grads=True)
        want = torch.cat([t.flatten() for t in g])
        for size in (None, 1, 7):
            got = fi.mean_gradient(model, loss, (x, y), chunk_size=size)
            torch.testing.assert_close(got, want)
        assert all(p.grad is None for p in model.parameters())


class RandomOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.5, training=True)


def test_bad_input() -> None:
    model, loss, x, y = case("softmax regression")
    H = fi.Hessian(model, loss, (x, y))
    with pytest.raises(ValueError, match=r"v must have shape \[15\] or \[R, 15\], got \[14\]"):
        H @ torch.ones(14, dtype=DOUBLE)
    with pytest.raises(ValueError, match=r"v is torch.float32 .* use v.to\(H.device, H.dtype\)"):
        H @ torch.ones(15)
    with pytest.raises(ValueError, match="one entry for each of the 23 rows"):
        fi.Hessian(model, loss, (x, y), weights=torch.ones(3))
    with pytest.raises(ValueError, match="weights must be finite"):
        fi.Hessian(model, loss, (x, y), weights=torch.full((N,), torch.nan))
    with pytest.raises(ValueError, match="23 inputs and 22 targets"):
        fi.Hessian(model, loss, (x, y[:-1]))
    with pytest.raises(ValueError, match="data has no rows"):
        fi.Hessian(model, loss, (x[:0], y[:0]))
    with pytest.raises(ValueError, match="hold no targets"):
        fi.Hessian(model, loss, TensorDataset(x))
    with pytest.raises(TypeError, match="a Dataset or a DataLoader, got list"):
        fi.Hessian(model, loss, [x, y])  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"must return the mean loss, a scalar tensor; got shape \[23\]"
    ):
        fi.Hessian(model, nn.CrossEntropyLoss(reduction="none"), (x, y))
    with pytest.raises(ValueError, match="different outputs for the same inputs"):
        fi.Hessian(RandomOutput().double(), loss, (x, y))
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        fi.Hessian(model, loss, (x, y), chunk_size=0)
