"""Preconditioned conjugate gradients, and the rows that the preconditioner is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.functional import cross_entropy, mse_loss

import fastif_ext as fi
from fastif_ext.curvature import factor, make_curvature
from fastif_ext.curvature.factor import output_directions, rows_worth_taking
from fastif_ext.preconditioner import LowRankPreconditioner
from fastif_ext.training import train_lbfgs

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 4


@pytest.fixture
def small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preconditioners for small problems, too."""
    monkeypatch.setattr(factor, "LEAST_WORK", 1)
    monkeypatch.setattr(factor, "LEAST_ROWS", 1)


def layered() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(27, 8),
        nn.ReLU(),
        nn.Linear(8, CLASSES),
    )


class Branching(nn.Module):
    """A network whose products are autograd's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(36, 8), nn.Linear(36, CLASSES)
        self.c = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.c(torch.tanh(self.a(x))) + self.b(x)


MODELS: dict[str, Callable[[], nn.Module]] = {"layered": layered, "branching": Branching}


def case(name: str, n: int = 30) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(2)
    model = MODELS[name]().double()
    x = torch.randn(n, 1, 6, 6, dtype=torch.float64)
    return model, x, model(x).detach().argmax(1).roll(1)


def jacobians(model: nn.Module, x: Tensor) -> Tensor:
    """[n, C, p] by torch.func."""
    model = copy.deepcopy(model).eval()
    named = {k: p.detach() for k, p in model.named_parameters()}

    def logits(params: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, params, (one[None],))[0]

    parts = vmap(jacrev(logits), (None, 0))(named, x)
    return torch.cat([part.flatten(2) for part in parts.values()], 2)


def probabilities(n: int = 20) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(n, 5, generator=g, dtype=torch.float64)
    return logits.softmax(1), torch.rand(n, generator=g, dtype=torch.float64)


class TestOutputDirections:
    def test_all_pivots_make_up_the_softmax_matrix(self) -> None:
        probs, weights = probabilities()
        found = output_directions(probs, weights, 10**6)
        assert found is not None
        total = torch.zeros(len(probs), 5, 5, dtype=torch.float64)
        outer = found.directions[:, :, None] * found.directions[:, None, :]
        total.index_add_(0, found.rows, outer)
        S = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
        torch.testing.assert_close(total, weights[:, None, None] * S, rtol=0, atol=1e-12)

    def test_the_largest_come_and_never_make_more_than_the_matrix(self) -> None:
        probs, weights = probabilities()
        found = output_directions(probs, weights, 15)
        assert found is not None
        assert len(found.rows) == 15
        S = weights[:, None, None] * (
            torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
        )
        outer = found.directions[:, :, None] * found.directions[:, None, :]
        left = S.clone().index_add_(0, found.rows, outer, alpha=-1)
        assert float(torch.linalg.eigvalsh(left).min()) > -1e-12
        assert float(left.diagonal(dim1=1, dim2=2).sum()) < 0.3 * float(
            S.diagonal(dim1=1, dim2=2).sum()
        )

    def test_certain_rows_give_zeros_and_few_rows_are_refused(self) -> None:
        sure = torch.eye(3, dtype=torch.float64)
        found = output_directions(sure, torch.ones(3, dtype=torch.float64), 4)
        assert found is None or not found.directions.any()
        probs = torch.full((1000, 3), 1 / 3)
        assert output_directions(probs, torch.full((1000,), 1e-3), 10) is None
        assert output_directions(torch.ones(4, 1), torch.ones(4), 2) is None  # one class

    def test_how_many_rows(self) -> None:
        assert rows_worth_taking(400, 2410, 1) == 0  # small
        assert rows_worth_taking(100_000, 2410, 1) == 0  # of too many rows
        assert rows_worth_taking(100, 90_000, 1) == 42
        assert rows_worth_taking(100, 90_000, 8) == 100
        assert rows_worth_taking(100, 1 << 30, 1) == 0  # would take too much memory


@pytest.mark.usefixtures("small_counts")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
def test_all_rows_make_the_gauss_newton_matrix(
    kind: str, name: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factor, "MOST_ROWS", 10**6)
    model, x, y = case(name)
    weights = torch.rand(len(x), dtype=torch.float64) if weighted else None
    H = make_curvature(kind, model, cross_entropy, (x, y), weights=weights, chunk_size=11)
    assert H.by_hand == (name == "layered")
    M = H.preconditioner(0.3, 1000)
    assert M is not None
    w = torch.full((len(x),), 1 / len(x), dtype=torch.float64) if weights is None else weights
    J, probs = jacobians(model, x), model(x).detach().softmax(1)
    S = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
    G = torch.einsum("n,ncp,ncd,ndq->pq", w, J, S, J)
    eye = torch.eye(H.dim, dtype=torch.float64)
    torch.testing.assert_close((M @ eye) @ (G + 0.3 * eye), eye, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("small_counts")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
def test_chunks_without_a_chosen_row(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weight is on the rows of one chunk, so the rows chosen are among them."""
    monkeypatch.setattr(factor, "MOST_ROWS", 11)
    model, x, y = case(name)
    weights = torch.full((len(x),), 1e-9, dtype=torch.float64)
    weights[11:22] = 1.0
    options: dict[str, Any] = {"weights": weights}
    got, want = (
        make_curvature(kind, model, cross_entropy, (x, y), chunk_size=size, **options)
        for size in (11, len(x))
    )
    few = got.preconditioner(0.3, 4), want.preconditioner(0.3, 4)
    assert few[0] is not None
    assert few[1] is not None
    eye = torch.eye(got.dim, dtype=torch.float64)
    torch.testing.assert_close(few[0] @ eye, few[1] @ eye, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("small_counts")
@pytest.mark.parametrize("params", [["3.*"], ["5.bias", "0.weight"], "mask"])
def test_selected_parameters(params: Any) -> None:
    model, x, y = case("layered")
    if params == "mask":
        p = sum(q.numel() for q in model.parameters())
        params = torch.rand(p, generator=torch.Generator().manual_seed(0)) < 0.4
    H = fi.Hessian(model, cross_entropy, (x, y), params=params)
    some, everything = (
        H.preconditioner(1.0, 4),
        fi.Hessian(model, cross_entropy, (x, y)).preconditioner(1.0, 4),
    )
    assert some is not None
    assert everything is not None
    place = H.selection.embed(torch.ones(1, H.dim)).bool()[0]
    rows = everything._rows[:, place]
    order = (rows @ rows.T - some._rows @ some._rows.T).abs().max()
    assert float(order) < 1e-12


@pytest.mark.usefixtures("small_counts")
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_alone(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor, "MOST_ROWS", 10**6)
    torch.manual_seed(0)
    layer, x = nn.Linear(6, CLASSES, bias=bias).double(), torch.randn(30, 6, dtype=torch.float64)
    weights = torch.rand(30, dtype=torch.float64)
    H = fi.LinearSoftmaxHessian(x, layer(x).detach(), weights=weights, bias=bias)
    M = H.preconditioner(0.2, 1000)
    assert M is not None
    eye = torch.eye(H.dim, dtype=torch.float64)
    torch.testing.assert_close(M @ (H @ eye + 0.2 * eye), eye, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("small_counts")
class TestSolves:
    @pytest.mark.parametrize("R", [1, 3])
    @pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
    @pytest.mark.parametrize("name", MODELS)
    def test_fewer_products_to_the_same_solution(self, name: str, kind: str, R: int) -> None:
        model, x, y = case(name)
        # where the network fits, the Gauss-Newton part is the larger one
        train_lbfgs(model, x, y, l2=1e-2, tol=1e-4)
        H: Any = (
            fi.Hessian(model, cross_entropy, (x, y))
            if kind == "hessian"
            else fi.GaussNewton(model, (x, y))
        )
        b = torch.randn(R, H.dim, dtype=torch.float64)
        damping = fi.cg(H, b, damping="auto", tol=1e-3, preconditioner=None).damping
        plain = fi.cg(H, b, damping=damping, tol=1e-8, preconditioner=None)
        found = fi.cg(H, b, damping=damping, tol=1e-8)
        assert found.converged
        assert found.iterations < plain.iterations
        assert found.history[-1] <= 1e-8
        torch.testing.assert_close(found.x, plain.x, rtol=0, atol=1e-6 * float(plain.x.abs().max()))

    @pytest.mark.parametrize("block", [True, False])
    def test_dependent_and_zero_right_hand_sides(self, block: bool) -> None:
        model, x, y = case("layered")
        H = fi.GaussNewton(model, (x, y))
        b = torch.randn(5, H.dim, dtype=torch.float64)
        b[1], b[2], b[3] = b[0], 0, b[0] - 2 * b[4]
        result = fi.cg(H, b, damping=0.01, tol=1e-9, block=block)
        assert result.converged
        assert not result.x[2].any()
        exact = fi.exact(H, b, damping=0.01)
        torch.testing.assert_close(result.x, exact.x, rtol=0, atol=1e-6)

    def test_the_history_is_that_of_the_true_residual(self) -> None:
        model, x, y = case("layered")
        H = fi.GaussNewton(model, (x, y))
        b = torch.randn(2, H.dim, dtype=torch.float64)
        for block in (True, False):
            whole = fi.cg(H, b, damping=0.05, tol=1e-9, block=block)
            for k in (1, 3):
                with pytest.warns(UserWarning, match="cg: residual"):
                    some = fi.cg(H, b, damping=0.05, tol=1e-9, block=block, max_iter=k)
                worst = float(some.residual.max())
                assert worst == pytest.approx(whole.history[k - 1], rel=1e-6)

    def test_negative_curvature_is_told_in_terms_of_the_hessian(self) -> None:
        model, x, y = case("branching")
        H = fi.Hessian(model, cross_entropy, (x, y))
        least = fi.spectrum.spectrum(H, torch.zeros(H.dim, dtype=torch.float64)).smallest
        assert least < 0
        for R in (1, 3):
            b = torch.randn(R, H.dim, dtype=torch.float64)
            with pytest.raises(fi.SolverDivergence, match="indefinite"):
                fi.cg(H, b, damping=-least / 4, tol=1e-10)

    def test_single_precision_at_little_damping(self) -> None:
        model, x, y = case("layered")
        H = fi.GaussNewton(model.float(), (x.float(), y))
        b = torch.randn(3, H.dim) @ torch.diag(torch.ones(H.dim))
        assert H.preconditioner(1e-9, 3) is None  # would be rounding error
        result = fi.cg(H, b, damping=1e-3, tol=1e-4)
        assert result.converged


def test_a_preconditioner_of_ones_own() -> None:
    A = torch.diag(torch.logspace(0, 4, 50, dtype=torch.float64))
    b = torch.ones(2, 50, dtype=torch.float64)
    M = torch.diag(1 / A.diagonal())
    for block in (True, False):
        assert fi.cg(A, b, tol=1e-8, block=block, preconditioner=M).iterations == 1
        assert fi.cg(A, b, tol=1e-8, block=block).iterations > 10
    with pytest.raises(ValueError, match="preconditioner must be"):
        fi.cg(A, b, preconditioner="jacobi")


@pytest.mark.usefixtures("small_counts")
def test_a_model_that_does_not_depend_on_its_parameters() -> None:
    class Detached(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    _, x, y = case("branching")
    H = fi.Hessian(Detached().double(), cross_entropy, (x, y))
    with pytest.raises(ValueError, match="does not depend on the selected parameters"):
        fi.cg(H, torch.ones(H.dim, dtype=torch.float64), damping=1.0)


def test_where_there_is_none() -> None:
    model, x, y = case("layered")
    H = fi.Hessian(model, lambda out, t: mse_loss(out, torch.eye(CLASSES).double()[t]), (x, y))
    assert H.preconditioner(1.0, 1000) is None  # another loss
    assert fi.Hessian(model, cross_entropy, (x, y)).preconditioner(1.0, 1) is None  # small
    with pytest.raises(ValueError, match="damping must be positive"):
        LowRankPreconditioner(torch.ones(1, 2), 0.0)
