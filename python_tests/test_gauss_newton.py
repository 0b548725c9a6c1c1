"""GaussNewton and LinearSoftmaxHessian against dense J^T B J and the Hessian."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import Tied, Tokens
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastif_ext as fi

pytestmark = pytest.mark.usefixtures("one_thread")

DOUBLE = torch.float64
N = 23
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class Conv(nn.Module):
    """Conv, batch norm with running statistics, in-place ReLU, dropout, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)
        self.norm.running_mean.uniform_(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.relu(self.norm(self.conv(x)))).flatten(1))


def case(name: str) -> tuple[nn.Module, Callable[..., Tensor], Any, Tensor]:
    torch.manual_seed(5)
    x, y = torch.randn(N, 3, dtype=DOUBLE), torch.randint(3, (N,))
    loss: Callable[..., Tensor] = F.cross_entropy
    if name == "mlp":
        model: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    elif name == "conv":
        model, x = Conv(), torch.randn(N, 1, 4, 4, dtype=DOUBLE)
    elif name == "tied":
        model = Tied()
    elif name == "attention":
        model, x = Tokens(), torch.randint(7, (N, 5))
    elif name == "mse":
        model, loss, y = Tied(), F.mse_loss, torch.randn(N, 3, dtype=DOUBLE)
    else:
        assert name == "smooth l1"
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        loss, y = nn.SmoothL1Loss(), torch.randn(N, 2, dtype=DOUBLE)
    return model.double(), loss, x, y


CASES = ["mlp", "conv", "tied", "attention", "mse", "smooth l1"]


def dense(
    model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor, weights: Tensor
) -> Tensor:
    """sum_i w_i J_i^T B_i J_i, one example at a time, by reverse mode."""
    model = copy.deepcopy(model).eval()
    torch.backends.mha.set_fastpath_enabled(False)
    params = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros(2 * [sum(p.numel() for p in params)], dtype=DOUBLE)
    for i, w in enumerate(weights.double()):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = model(x[i : i + 1])
        rows = [torch.autograd.grad(o, params, retain_graph=True) for o in out[0]]
        J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        B = torch.func.hessian(lambda z, i=i: loss(z, y[i : i + 1]))(out.detach())[0, :, 0, :]
        total += w * J.T @ B @ J
    torch.backends.mha.set_fastpath_enabled(True)
    return total


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_equals_dense(name: str, weighted: bool, chunk_size: int | None) -> None:
    model, loss, x, y = case(name)
    weights = torch.rand(N) if weighted else torch.full((N,), 1 / N)
    G = fi.GaussNewton(
        model,
        (x, y),
        loss_fn=loss,
        weights=weights if weighted else None,
        chunk_size=chunk_size,
        graph_memory=0 if chunk_size and name == "mlp" else 1 << 30,
    )
    got = G @ torch.eye(G.dim, dtype=DOUBLE)
    weights = weights if weighted else torch.full((N,), 1 / N, dtype=DOUBLE)
    torch.testing.assert_close(got, dense(model, loss, x, y, weights), **CLOSE)
    v = torch.randn(G.dim, dtype=DOUBLE)
    torch.testing.assert_close(G @ v, got @ v, **CLOSE)
    torch.testing.assert_close(G.selection.join(G.products(v[None]))[0], got @ v, **CLOSE)
    assert torch.linalg.eigvalsh(got)[0] > -1e-10


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_hessian_of_attention_and_of_a_linear_head(name: str) -> None:
    """Linear in the selected parameters: Gauss-Newton is the Hessian."""
    model, loss, x, y = case(name)
    head = model[2] if name == "mlp" else model.head
    H = fi.Hessian(model, loss, (x, y), params=head)
    G = fi.GaussNewton(model, (x, y), params=head)
    eye = torch.eye(H.dim, dtype=DOUBLE)
    torch.testing.assert_close(G @ eye, H @ eye, **CLOSE)


def test_hessian_through_attention() -> None:
    model, loss, x, y = case("attention")
    H = fi.Hessian(model, loss, (x, y))
    names = dict(model.named_parameters())

    def f(*values: Tensor) -> Tensor:
        return loss(functional_call(model, dict(zip(names, values, strict=True)), (x,)), y)

    v = torch.randn(H.dim, dtype=DOUBLE)
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        values = tuple(p.detach() for p in names.values())
        tangents = tuple(t[0] for t in H.selection.split(v[None]))
        grad = torch.func.grad(f, tuple(range(len(values))))
        want = torch.func.jvp(grad, values, tangents)[1]
    torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(H @ v, torch.cat([t.flatten() for t in want]), **CLOSE)


def test_attention_switches_come_back() -> None:
    model, _, x, y = case("attention")
    torch.backends.mha.set_fastpath_enabled(True)
    flash = torch.backends.cuda.flash_sdp_enabled()
    model.train()
    fi.GaussNewton(model, (x, y)) @ torch.ones(sum(p.numel() for p in model.parameters())).double()
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() == flash
    assert all(m.training for m in model.modules())


class TestData:
    def test_dict_inputs(self) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 3, dtype=DOUBLE)

            def forward(self, *, a: Tensor, b: Tensor) -> Tensor:
                return self.layer(torch.tanh(a + b))

        torch.manual_seed(0)
        model, y = Named(), torch.randint(3, (N,))
        a, b = torch.randn(2, N, 3, dtype=DOUBLE)
        loss = nn.CrossEntropyLoss(label_smoothing=0.1)
        G = fi.GaussNewton(model, ({"a": a, "b": b}, y), loss_fn=loss)
        S = fi.LinearSoftmaxHessian(torch.tanh(a + b), model.layer(torch.tanh(a + b)).detach())
        v = torch.randn(4, 12, dtype=DOUBLE)
        torch.testing.assert_close(G @ v, S @ v, **CLOSE)

    def test_ragged_last_batch(self) -> None:
        model, _, x, y = case("mlp")
        loader = DataLoader(TensorDataset(x, y), 5)
        v = torch.randn(31, dtype=DOUBLE)
        torch.testing.assert_close(
            fi.GaussNewton(model, loader) @ v, fi.GaussNewton(model, (x, y)) @ v, **CLOSE
        )

    def test_dead_features(self) -> None:
        """A constant-zero input column has zero rows, and cg and lissa converge all the same."""
        model, loss, x, y = case("mlp")
        x[:, 1] = 0
        for H in (fi.GaussNewton(model, (x, y)), fi.Hessian(model, loss, (x, y))):
            dead = H @ torch.eye(31, dtype=DOUBLE)
            assert dead.view(31, 31)[:, 1:12:3].abs().max() == 0
        G = fi.GaussNewton(model, (x, y))
        b = G @ torch.ones(31, dtype=DOUBLE)
        for solve in (fi.cg, fi.lissa):
            assert solve(G, b, damping=0.01, tol=1e-6, max_iter=5000).converged

    def test_frozen_and_selected_parameters(self) -> None:
        model, _, x, y = case("mlp")
        full = fi.GaussNewton(model, (x, y)) @ torch.eye(31, dtype=DOUBLE)
        mask = torch.rand(31) < 0.4
        G = fi.GaussNewton(model, (x, y), params=mask)
        got = G @ torch.eye(G.dim, dtype=DOUBLE)
        torch.testing.assert_close(got, full[mask][:, mask], **CLOSE)
        model[0].requires_grad_(False)
        G = fi.GaussNewton(model, (x, y))
        torch.testing.assert_close(G @ torch.eye(15, dtype=DOUBLE), full[16:, 16:], **CLOSE)

    @pytest.mark.parametrize("name", CASES)
    def test_single_precision(self, name: str) -> None:
        model, loss, x, y = case(name)
        want = fi.GaussNewton(model, (x, y), loss_fn=loss)
        v = torch.randn(3, want.dim, dtype=DOUBLE)
        x32 = x.float() if x.is_floating_point() else x
        y32 = y.float() if y.is_floating_point() else y
        G = fi.GaussNewton(model.float(), (x32, y32), loss_fn=loss)
        torch.testing.assert_close((G @ v.float()).double(), want @ v, rtol=1e-3, atol=1e-4)


class TestOutputHessian:
    def test_identity_gives_the_jacobian_gram(self) -> None:
        model, _, x, y = case("mlp")
        G = fi.GaussNewton(model, (x, y), output_hessian=lambda out, target, z: z)
        gram = fi.GaussNewton(
            model, (x, torch.zeros(N, 3, dtype=DOUBLE)),
            loss_fn=lambda out, t: (out - t).square().sum(1).mean() / 2,
        )  # fmt: skip
        v = torch.randn(2, 31, dtype=DOUBLE)
        torch.testing.assert_close(G @ v, gram @ v, **CLOSE)

    def test_wrong_shape(self) -> None:
        model, _, x, y = case("mlp")
        with pytest.raises(ValueError, match=r"output_hessian must return .*\[1, 4, 3\]"):
            fi.GaussNewton(model, (x, y), output_hessian=lambda out, target, z: z[0, 0])


def test_errors() -> None:
    model, _, x, y = case("mlp")
    with pytest.raises(ValueError, match=r"\[31\] or \[R, 31\]"):
        fi.GaussNewton(model, (x, y)) @ torch.ones(3, dtype=DOUBLE)

    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    with pytest.raises(ValueError, match="must return a tensor, got a tuple; wrap it"):
        fi.GaussNewton(
            Pair(3, 3).double(), (x, y), loss_fn=lambda out, t: F.cross_entropy(out[0], t)
        )

    class Detached(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(ValueError, match="does not depend on the selected parameters"):
        fi.GaussNewton(Detached(3, 3).double(), (x, y)) @ torch.ones(12, dtype=DOUBLE)


def test_random_backward_is_refused() -> None:
    """Outputs that are the same twice, and a backward pass that is not."""

    class Noise(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * (1 + torch.rand_like(g))

    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Noise.apply(super().forward(x))

    rng = torch.get_rng_state()
    model = Noisy(3, 3, dtype=DOUBLE)
    rng = torch.get_rng_state()
    data = torch.ones(8, 3, dtype=DOUBLE), torch.arange(8) % 3
    with pytest.raises(ValueError, match="comes out differently twice"):
        fi.Hessian(model, F.cross_entropy, data)
    assert torch.equal(torch.get_rng_state(), rng)


class TestLinearSoftmax:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("weighted", [True, False])
    def test_equals_the_hessian(self, bias: bool, weighted: bool) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(4, 3, bias=bias, dtype=DOUBLE)
        x, y = torch.randn(N, 4, dtype=DOUBLE), torch.randint(3, (N,))
        w = torch.rand(N) if weighted else None
        S = fi.LinearSoftmaxHessian(x, layer(x).detach(), weights=w, bias=bias)
        H = fi.Hessian(layer, F.cross_entropy, (x, y), weights=w)
        v = torch.randn(5, H.dim, dtype=DOUBLE)
        assert H.dim == S.dim == 12 + 3 * bias
        assert S.rows == N
        torch.testing.assert_close(S @ v, H @ v, **CLOSE)
        torch.testing.assert_close(S @ v[0], H @ v[0], **CLOSE)
        a = fi.cg(S, v, damping=0.1, tol=1e-10).x
        torch.testing.assert_close(a, fi.lissa(H, v, damping=0.1, tol=1e-9).x)

    def test_of_last_layer(self) -> None:
        model, loss, x, y = case("conv")
        model.train()
        weights = torch.rand(N)
        loader = DataLoader(TensorDataset(x, y), 7)
        S = fi.LinearSoftmaxHessian.of_last_layer(model, loader, weights=weights)
        H = fi.Hessian(model, loss, (x, y), params=model.head, weights=weights)
        v = torch.randn(2, H.dim, dtype=DOUBLE)
        torch.testing.assert_close(S @ v, H @ v, **CLOSE)
        assert model.training

    def test_bad_input(self) -> None:
        x, logits = torch.randn(5, 4), torch.randn(5, 3)
        S = fi.LinearSoftmaxHessian
        with pytest.raises(ValueError, match="features has 4 rows, logits has 5"):
            S(x[:4], logits)
        with pytest.raises(ValueError, match="logits must be a tensor"):
            S(x, logits[0])
        with pytest.raises(TypeError, match=r"both must be float32 or both float64"):
            S(x.double(), logits)
        with pytest.raises(ValueError, match="weights must be finite, one for each of the 5 rows"):
            S(x, logits, weights=torch.ones(4))
        with pytest.raises(ValueError, match="NaN or infinite"):
            S(x * float("nan"), logits)
        with pytest.raises(ValueError, match=r"\[15\] or \[R, 15\]"):
            S(x, logits) @ torch.ones(14)
        data = DataLoader(TensorDataset(x, torch.arange(5) % 3))
        after = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
        with pytest.raises(ValueError, match="something follows it"):
            S.of_last_layer(after, data)
        with pytest.raises(ValueError, match=r"no nn.Linear"):
            S.of_last_layer(nn.Tanh(), data)


def test_a_row_for_padding_has_no_part() -> None:
    """Backward passes give an embedding's row for padding no gradient; forward mode would."""
    torch.manual_seed(0)
    table = nn.Embedding(5, 3, padding_idx=1)
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randint(5, (N, 4)), torch.randint(3, (N,))
    assert (x == 1).any()
    G = fi.GaussNewton(model, (x, y))
    A = G @ torch.eye(G.dim, dtype=DOUBLE)
    torch.testing.assert_close(A, A.T, **CLOSE)
    padding = slice(3, 6)  # of the table's rows of 3 the second one
    assert not A[padding].any()
    assert A[:3].any()
    assert not table._forward_hooks
