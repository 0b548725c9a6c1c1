"""The Hessian operator and mean_gradient, against dense float64 derivatives by torch.func."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import Tied
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fastif_ext as fi
from fastif_ext.curvature import make_curvature
from fastif_ext.data import tensors_of

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class Net(nn.Module):
    """Conv, batch norm with running statistics, dropout, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.norm(self.conv(x)))).flatten(1))


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1).mean()


N = 23


def case(name: str) -> tuple[nn.Module, Callable[..., Tensor], Tensor, Tensor]:
    """Model, loss, inputs, targets of one of the tested kinds, in float64."""
    torch.manual_seed(7)
    x, y = torch.randn(N, 3), torch.randint(3, (N,))
    loss: Callable[..., Tensor] = F.cross_entropy
    if name == "linear":
        model, y, loss = nn.Linear(3, 2), torch.randn(N, 2), F.mse_loss
    elif name == "softmax":
        model, loss = nn.Linear(3, 3), nn.CrossEntropyLoss()
    elif name == "mlp":
        model, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(N, 2)
        loss = squared
    elif name == "conv":
        model, x = Net(), torch.randn(N, 1, 4, 4)
        model.norm.running_mean.uniform_(-1, 1)
        model.norm.running_var.uniform_(0.5, 2)
    elif name == "groups":  # torch's second backward pass takes no batch of directions there
        layers = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
        model, x = nn.Sequential(*layers), torch.randn(N, 1, 4, 4)
    else:
        assert name == "tied"
        model = Tied()
    if y.is_floating_point():
        y = y.double()
    return model.double(), loss, x.double(), y


CASES = ["linear", "softmax", "mlp", "conv", "groups", "tied"]


def dense(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    x: Any,
    y: Tensor,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian over all trainable parameters; with weights, by single examples."""
    model = copy.deepcopy(model).eval()
    trainable = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in trainable.values()]

    def f(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        named = {k: part.view_as(p) for (k, p), part in zip(trainable.items(), parts, strict=True)}
        out = functional_call(model, named, (x,))
        if weights is None:
            return loss_fn(out, y)
        return sum(
            w * loss_fn(out[i : i + 1], y[i : i + 1]) for i, w in enumerate(weights.double())
        )

    flat = torch.cat([p.flatten() for p in trainable.values()])
    return torch.func.grad(f)(flat), torch.func.hessian(f)(flat)


def matrix(H: fi.Hessian) -> Tensor:
    return H @ torch.eye(H.dim, dtype=H.dtype)


class Rows(Dataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1, 7])
@pytest.mark.parametrize("name", CASES)
def test_equals_dense(name: str, chunk_size: int | None, weighted: bool) -> None:
    model, loss, x, y = case(name)
    weights = torch.rand(N, dtype=torch.float64) + 0.1 if weighted else None
    gradient, expected = dense(model, loss, x, y, weights)
    H = fi.Hessian(model, loss, (x, y), weights=weights, chunk_size=chunk_size)
    A = matrix(H)
    torch.testing.assert_close(A, expected, **CLOSE)
    torch.testing.assert_close(A, A.T, **CLOSE)
    g = fi.mean_gradient(model, loss, (x, y), weights=weights, chunk_size=chunk_size)
    torch.testing.assert_close(g, gradient, **CLOSE)
    if name == "mlp":
        assert torch.linalg.eigvalsh(A)[0] < -0.01  # the case is indefinite indeed


@pytest.mark.parametrize("graph_memory", [0, 1 << 30])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_right_hand_sides_and_graphs(name: str, graph_memory: int) -> None:
    model, loss, x, y = case(name)
    expected = dense(model, loss, x, y)[1]
    H = fi.Hessian(model, loss, (x, y), graph_memory=graph_memory)
    assert H.cached == (graph_memory > 0)
    for R in (0, 1, 5):
        v = torch.randn(R, H.dim, dtype=torch.float64)
        torch.testing.assert_close(H @ v, v @ expected, **CLOSE)
        tensors = H.products(v)
        assert all(t.shape[0] == R for t in tensors)
        torch.testing.assert_close(torch.cat([t.flatten(1) for t in tensors], 1) if R else v, H @ v)
    one = torch.randn(H.dim, dtype=torch.float64)
    torch.testing.assert_close(H @ one, expected @ one, **CLOSE)
    assert not (H @ one).requires_grad


class TestData:
    def sources(self) -> dict[str, Any]:
        _, _, x, y = case("conv")
        order = torch.Generator().manual_seed(3)
        rows = Rows(x, y)
        return {
            "tensors": (x, y),
            "TensorDataset": TensorDataset(x, y),
            "Dataset": rows,
            "loader": DataLoader(rows, batch_size=5),
            "shuffled": DataLoader(rows, batch_size=5, shuffle=True, generator=order),
        }

    @pytest.mark.parametrize(
        "source", ["tensors", "TensorDataset", "Dataset", "loader", "shuffled"]
    )
    def test_every_source(self, source: str) -> None:
        model, loss, x, y = case("conv")
        gradient, expected = dense(model, loss, x, y)
        H = fi.Hessian(model, loss, self.sources()[source], graph_memory=0)
        torch.testing.assert_close(matrix(H), expected, **CLOSE)
        torch.testing.assert_close(
            fi.mean_gradient(model, loss, self.sources()[source]), gradient, **CLOSE
        )

    def test_weights_follow_the_rows_as_read(self) -> None:
        model, loss, x, y = case("softmax")
        w = torch.rand(N, dtype=torch.float64)
        expected = dense(model, loss, x, y, w)[1]
        H = fi.Hessian(model, loss, DataLoader(Rows(x, y), batch_size=4), weights=w, chunk_size=3)
        torch.testing.assert_close(matrix(H), expected, **CLOSE)

    def test_a_loader_is_read_once(self) -> None:
        model, loss, x, y = case("softmax")

        class Counting(Rows):
            reads = 0

            def __getitem__(self, i: int) -> Any:
                Counting.reads += 1
                return super().__getitem__(i)

        H = fi.Hessian(model, loss, DataLoader(Counting(x, y), 5, shuffle=True), graph_memory=0)
        v = torch.randn(H.dim, dtype=torch.float64)
        assert torch.equal(H @ v, H @ v)
        assert Counting.reads == N

    def test_dict_inputs(self) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(3, 3, dtype=torch.float64)

            def forward(self, *, left: Tensor, right: Tensor) -> Tensor:
                return self.a(left * right)

        _, loss, x, y = case("softmax")
        model = Named()
        expected = dense(model.a, loss, x * x, y)[1]
        H = fi.Hessian(model, loss, ({"left": x, "right": x}, y), chunk_size=7)
        torch.testing.assert_close(matrix(H), expected, **CLOSE)
        rows = [{"left": a, "right": a, "labels": b} for a, b in zip(x, y, strict=True)]
        H = fi.Hessian(model, loss, DataLoader(rows, batch_size=7))  # type: ignore[arg-type]
        torch.testing.assert_close(matrix(H), expected, **CLOSE)


class TestParams:
    def expected(self, mask: Tensor) -> tuple[nn.Module, Tensor, Any, Tensor]:
        model, loss, x, y = case("conv")
        g, A = dense(model, loss, x, y)
        return model, g[mask], (loss, (x, y)), A[mask][:, mask]

    @pytest.mark.parametrize("kind", ["names", "pattern", "module", "mask", "partial"])
    @pytest.mark.parametrize("graph_memory", [0, 1 << 30])
    def test_selections(self, kind: str, graph_memory: int) -> None:
        model = case("conv")[0]
        total = sum(p.numel() for p in model.parameters())
        mask = torch.zeros(total, dtype=torch.bool)
        mask[-27:] = True  # head.weight (24) and head.bias (3) come last
        if kind == "partial":
            mask = torch.rand(total) < 0.4
        model, gradient, (loss, data), expected = self.expected(mask)
        params: Any = {
            "names": ["head.bias", "head.weight"],
            "pattern": ["head*"],
            "module": model.head,
            "mask": mask,
            "partial": mask,
        }[kind]
        H = fi.Hessian(model, loss, data, params=params, graph_memory=graph_memory)
        assert H.dim == len(gradient)
        torch.testing.assert_close(matrix(H), expected, **CLOSE)
        torch.testing.assert_close(
            fi.mean_gradient(model, loss, data, params=params), gradient, **CLOSE
        )
        v = torch.randn(3, H.dim, dtype=torch.float64)
        flat = torch.cat([t.flatten(1) for t in H.products(v)], 1)
        torch.testing.assert_close(flat, H @ v)

    def test_frozen_parameters_are_constants(self) -> None:
        model, loss, x, y = case("mlp")
        model[0].weight.requires_grad_(False)
        gradient, expected = dense(model, loss, x, y)
        H = fi.Hessian(model, loss, (x, y))
        assert H.dim == 4 + 8 + 2
        torch.testing.assert_close(matrix(H), expected, **CLOSE)
        torch.testing.assert_close(fi.mean_gradient(model, loss, (x, y)), gradient, **CLOSE)

    def test_unused_parameter_has_zero_rows(self) -> None:
        model, loss, x, y = case("softmax")
        model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        expected = dense(model, loss, x, y)[1]
        for weights in (None, torch.ones(N)):
            A = matrix(fi.Hessian(model, loss, (x, y), weights=weights))
            scaled = A if weights is None else A / N
            torch.testing.assert_close(scaled, expected, **CLOSE)
        with pytest.raises(ValueError, match=r"does not depend .*unused"):
            fi.mean_gradient(model, loss, (x, y), params=["unused"])
        H = fi.Hessian(model, loss, (x, y), params=["unused"])
        with pytest.raises(ValueError, match=r"does not depend .*unused"):
            H @ torch.ones(2, dtype=torch.float64)

    def test_linear_loss_has_no_curvature(self) -> None:
        model = nn.Linear(3, 1, dtype=torch.float64)
        data = torch.randn(4, 3, dtype=torch.float64), torch.zeros(4)
        H = fi.Hessian(model, lambda out, y: out.mean(), data)
        assert torch.equal(matrix(H), torch.zeros(4, 4, dtype=torch.float64))

    def test_unflatten(self) -> None:
        model, loss, x, y = case("mlp")
        mask = torch.zeros(26, dtype=torch.bool)
        mask[[0, 13]] = True  # one weight and one bias of the first layer
        H = fi.Hessian(model, loss, (x, y), params=mask)
        parts = H.unflatten(torch.tensor([5.0, 6.0], dtype=torch.float64))
        assert {k: t.shape for k, t in parts.items()} == {"0.weight": (4, 3), "0.bias": (4,)}
        assert parts["0.weight"][0, 0] == 5
        assert parts["0.weight"].sum() == 5
        assert parts["0.bias"].tolist() == [0, 6, 0, 0]
        assert H.unflatten(torch.ones(3, 2, dtype=torch.float64))["0.bias"].shape == (3, 4)


class TestState:
    def test_nothing_is_changed(self) -> None:
        model, loss, x, y = case("conv")
        model.train()
        model.drop.eval()
        model.norm.weight.grad = torch.ones(2, dtype=torch.float64)
        model.norm.bias.requires_grad_(False)
        before = copy.deepcopy(model)
        rng = torch.get_rng_state()
        shuffling = DataLoader(Rows(x, y), batch_size=5, shuffle=True)
        H = fi.Hessian(model, loss, shuffling)
        fi.mean_gradient(model, loss, shuffling)
        fi.lissa(H, torch.ones(H.dim, dtype=torch.float64), damping="auto", tol=1e-2)
        assert torch.equal(torch.get_rng_state(), rng)
        for (name, new), old in zip(
            model.state_dict().items(), before.state_dict().values(), strict=True
        ):
            assert torch.equal(new, old), name
        for new, old in zip(model.parameters(), before.parameters(), strict=True):
            assert new.requires_grad == old.requires_grad
            assert new is model.norm.weight or new.grad is None
        assert torch.equal(model.norm.weight.grad, torch.ones(2, dtype=torch.float64))
        assert [m.training for m in model.modules()] == [m.training for m in before.modules()]

    def test_flags_come_back_when_the_model_raises(self) -> None:
        class Raising(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                raise RuntimeError("broken model")

        model = nn.Sequential(Raising(3, 3), nn.Dropout())
        model[1].eval()
        with pytest.raises(RuntimeError, match="broken model"):
            fi.Hessian(model, F.cross_entropy, (torch.ones(2, 3), torch.zeros(2).long()))
        assert model.training
        assert not model[1].training

    @pytest.mark.parametrize("kind", ["hessian", "gauss-newton", "gradient"])
    def test_a_module_held_twice(self, kind: str) -> None:
        twice = nn.Linear(3, 3)
        model = nn.Sequential(twice, nn.Tanh(), twice, nn.BatchNorm1d(3), nn.Linear(3, 3)).double()
        before = dict(model.named_parameters(remove_duplicate=False))
        x, y = torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 3
        if kind == "gradient":
            fi.mean_gradient(model, F.cross_entropy, (x, y))
        else:
            H: Any = (
                fi.Hessian(model, F.cross_entropy, (x, y), params=["0.*"])
                if kind == "hessian"
                else fi.GaussNewton(model, (x, y), params=["0.*"])
            )
            H @ torch.ones(2, H.dim, dtype=torch.float64)
        after = dict(model.named_parameters(remove_duplicate=False))
        assert after.keys() == before.keys()
        assert all(after[name] is p for name, p in before.items())

    def test_a_buffer_written_in_forward_is_left_alone(self) -> None:
        class Counter(nn.Linear):
            def __init__(self) -> None:
                super().__init__(3, 3)
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x: Tensor) -> Tensor:
                self.calls += 1
                return super().forward(x)

        model = Counter()
        H = fi.Hessian(model, F.cross_entropy, (torch.ones(2, 3), torch.zeros(2).long()))
        H @ torch.ones(H.dim)
        assert model.calls == 0

    def test_later_training_does_not_change_it(self) -> None:
        model, loss, x, y = case("mlp")
        H = fi.Hessian(model, loss, (x, y), params=model[2], graph_memory=0)
        kept = fi.Hessian(model, loss, (x, y), params=model[2])
        v = torch.randn(H.dim, dtype=torch.float64)
        before = H @ v, kept @ v
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        assert torch.equal(H @ v, before[0])
        assert torch.equal(kept @ v, before[1])

    def test_memory_is_given_back(self) -> None:
        alive = []

        class Exp(torch.autograd.Function):
            """Saves its own output, which a hook that returns it would tie into a cycle."""

            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                alive.append(weakref.ref(ctx))
                out = x.exp()
                ctx.save_for_backward(out)
                return out

            @staticmethod
            def backward(ctx: Any, g: Tensor) -> Tensor:
                return g * ctx.saved_tensors[0]

        model, _, x, y = case("softmax")
        H = fi.Hessian(model, lambda out, t: Exp.apply(out).mean(), (x, y))
        expected = dense(model, lambda out, t: out.exp().mean(), x, y)[1]
        one = torch.ones(H.dim, dtype=torch.float64)
        torch.testing.assert_close(H @ one, expected @ one, **CLOSE)
        del H
        gc.collect()
        assert alive
        assert not any(ref() is not None for ref in alive)


class TestGraphBytes:
    @pytest.mark.parametrize("by_hand", [False, True])
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
    def test_within_a_factor_of_two(self, kind: str, weighted: bool, by_hand: bool) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 5)
        )
        if not by_hand:
            model.append(nn.LogSoftmax(1))
        x, y = torch.randn(700, 20), torch.randint(5, (700,))
        weights = torch.ones(700) if weighted else None
        H = make_curvature(kind, model, F.cross_entropy, (x, y), weights=weights)
        seen: dict[int, int] = {}
        keep = {t.untyped_storage().data_ptr() for t in [x, y, *H._leaves]}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in keep:
                seen[storage.data_ptr()] = storage.nbytes()
            return t.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            H @ torch.ones(H.dim)
        if by_hand:
            assert H.by_hand
            seen.clear()
            for t in tensors_of(H._kept):
                pack(t)
        measured = sum(seen.values())
        assert measured / 2 < H.graph_bytes < 2 * measured

    def test_counts_the_kept_graph_of_a_loss(self) -> None:
        torch.manual_seed(0)
        model, x, y = nn.Linear(20, 50), torch.randn(700, 20), torch.rand(700, 50)
        H = fi.GaussNewton(model, (x, y), loss_fn=nn.BCEWithLogitsLoss())
        assert H.by_hand
        seen: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            H @ torch.ones(H.dim)
        for t in tensors_of(H._kept):
            pack(t)
        assert sum(seen.values()) / 2 < H.graph_bytes < 2 * sum(seen.values())

    def test_decides_what_is_kept(self) -> None:
        model, loss, x, y = case("mlp")
        needed = fi.Hessian(model, loss, (x, y)).graph_bytes
        assert fi.Hessian(model, loss, (x, y), graph_memory=needed).cached
        assert not fi.Hessian(model, loss, (x, y), graph_memory=needed - 1).cached


class TestErrors:
    @pytest.mark.parametrize("shape", [(5,), (2, 5), (1, 1, 26), ()])
    def test_vector_shape(self, shape: tuple[int, ...]) -> None:
        model, loss, x, y = case("mlp")
        H = fi.Hessian(model, loss, (x, y))
        for multiply in (H.__matmul__, H.products):
            with pytest.raises(ValueError, match=r"\[26\] or \[R, 26\]"):
                multiply(torch.zeros(shape, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"got list"):
            H @ [1.0]  # type: ignore[operator]

    def test_vector_dtype(self) -> None:
        model, loss, x, y = case("mlp")
        with pytest.raises(ValueError, match=r"float32 .*float64.*v\.to"):
            fi.Hessian(model, loss, (x, y)) @ torch.zeros(26)

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            (torch.ones(N + 1), rf"{N} rows .*\[{N + 1}\]"),
            (torch.full((N,), float("nan")), "finite"),
            (torch.full((N,), float("inf")), "finite"),
            ([1.0] * N, "got list"),
        ],
    )
    def test_weights(self, weights: Any, message: str) -> None:
        model, loss, x, y = case("mlp")
        with pytest.raises(ValueError, match=message):
            fi.Hessian(model, loss, (x, y), weights=weights)

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (nn.CrossEntropyLoss(reduction="none"), r"mean loss.*\[23\].*reduction='mean'"),
            (nn.CrossEntropyLoss(reduction="sum"), r"mean over examples.*reduction='mean'"),
            (nn.CrossEntropyLoss(torch.tensor([1.0, 2, 9]).double()), r"class-weighted"),
            (lambda out, y: 1.0, "float"),
        ],
    )
    @pytest.mark.parametrize("weighted", [False, True])
    def test_loss_that_is_no_mean(self, loss: Any, message: str, weighted: bool) -> None:
        model, _, x, y = case("softmax")
        weights = torch.ones(N) if weighted else None
        with pytest.raises(ValueError, match=message):
            fi.Hessian(model, loss, (x, y), weights=weights)
        with pytest.raises(ValueError, match=message):
            fi.mean_gradient(model, loss, (x, y), weights=weights)

    def test_loss_without_gradient(self) -> None:
        model, loss, x, y = case("softmax")
        with pytest.raises(ValueError, match="does not depend"):
            fi.mean_gradient(model, lambda out, t: loss(out.detach(), t), (x, y))

    def test_missing_targets(self) -> None:
        model, loss, x, _ = case("softmax")
        with pytest.raises(ValueError, match="no targets"):
            fi.Hessian(model, loss, TensorDataset(x))

    @pytest.mark.parametrize("kind", ["tensors", "TensorDataset", "Dataset", "loader"])
    def test_no_rows(self, kind: str) -> None:
        model, loss, x, y = case("softmax")
        x, y = x[:0], y[:0]
        data: Any = {
            "tensors": (x, y),
            "TensorDataset": TensorDataset(x, y),
            "Dataset": Rows(x, y),
            "loader": DataLoader(Rows(x, y)),
        }[kind]
        with pytest.raises(ValueError, match="no rows"):
            fi.Hessian(model, loss, data)

    def test_random_outputs(self) -> None:
        class Noisy(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return F.dropout(super().forward(x), 0.5, training=True)

        data = torch.ones(8, 3), torch.zeros(8).long()
        rng = torch.get_rng_state()
        model = Noisy(3, 3)
        rng = torch.get_rng_state()
        with pytest.raises(ValueError, match="different outputs"):
            fi.Hessian(model, F.cross_entropy, data)
        assert torch.equal(torch.get_rng_state(), rng)

    def test_parameters_of_two_dtypes(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double())
        with pytest.raises(ValueError, match=r"share dtype.*1\.weight is torch.float64"):
            fi.Hessian(model, F.cross_entropy, (torch.ones(2, 3), torch.zeros(2).long()))

    @pytest.mark.parametrize("chunk_size", [0, -1])
    def test_chunk_size(self, chunk_size: int) -> None:
        model, loss, x, y = case("softmax")
        with pytest.raises(ValueError, match="chunk_size must be at least 1"):
            fi.Hessian(model, loss, (x, y), chunk_size=chunk_size)
