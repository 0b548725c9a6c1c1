"""The five variants against dense float64 algebra, with small damping, on a third of theta."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastif_ext as fi

pytestmark = pytest.mark.usefixtures("one_thread")

DOUBLE = torch.float64
N = 60
REMOVED = torch.arange(0, N, 7)
MODELS = ["linear regression", "softmax regression", "tanh mlp"]
CLOSE = {"rtol": 1e-6, "atol": 1e-9}


class Case:
    """A model at or near its minimum, its data, and its dense derivatives."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(3)
        self.loss: Any = F.cross_entropy
        self.x, self.y = torch.randn(N, 4, dtype=DOUBLE), torch.randint(3, (N,))
        if name == "linear regression":
            self.model: nn.Module = nn.Linear(4, 2).double()
            self.loss, self.y = F.mse_loss, torch.randn(N, 2, dtype=DOUBLE)
        elif name == "softmax regression":
            self.model = nn.Linear(4, 3).double()
        else:  # an untrained network: its Hessian is indefinite
            self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.p = sum(q.numel() for q in self.model.parameters())
        self.mask = torch.rand(self.p) < 1 / 3
        self.mask[0] = True

    def derivatives(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient and Hessian of the mean loss over some rows."""
        named = {k: q.detach() for k, q in self.model.named_parameters()}
        sizes = [q.numel() for q in named.values()]

        def f(flat: Tensor) -> Tensor:
            parts = {
                k: part.view_as(q)
                for (k, q), part in zip(named.items(), flat.split(sizes), strict=True)
            }
            return self.loss(functional_call(self.model, parts, (self.x[rows],)), self.y[rows])

        flat = torch.cat([q.flatten() for q in named.values()])
        return torch.func.grad(f)(flat), torch.func.hessian(f)(flat)

    def run(self, variant: str, **options: Any) -> fi.InfluenceResult:
        return fi.influence(
            self.model, self.loss, REMOVED, (self.x, self.y), variant=variant, **options
        )


def dense(case: Case, variant: str, damping: float, mask: Tensor) -> Tensor:
    """The formula of METHOD, written with inverses."""
    g, H_U = case.derivatives(REMOVED)
    H = case.derivatives(torch.arange(N))[1] + damping * torch.eye(case.p, dtype=DOUBLE)
    out, T = torch.zeros(case.p, dtype=DOUBLE), mask
    if variant == "if":
        return torch.linalg.solve(H, g)
    if variant == "pif":
        out[T] = torch.linalg.solve(H, g)[T]
    elif variant == "fif":
        out[T] = torch.linalg.solve(H[T][:, T], g[T])
    elif variant == "gif":
        out[T] = torch.linalg.lstsq(H[:, T], g[:, None]).solution[:, 0]
    else:
        rho = len(REMOVED) / N
        inverse = H[T][:, T].inverse()
        one = rho / (1 - rho) * inverse @ g[T]
        two = rho / (1 - rho) * inverse @ ((H - H_U)[T][:, T] @ one)
        out[T] = one + two
    return out


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("variant", ["if", "pif", "fif", "gif", "sif"])
def test_equals_dense_algebra(name: str, variant: str) -> None:
    """Exact solver: any sign of the eigenvalues; damping 1e-3 of the scale of H."""
    case = Case(name)
    if name == "tanh mlp":
        assert torch.linalg.eigvalsh(case.derivatives(torch.arange(N))[1])[0] < -1e-2
    params = None if variant == "if" else case.mask
    got = case.run(variant, params=params, solver="exact", damping=1e-3)
    want = dense(case, variant, 1e-3, case.mask)
    torch.testing.assert_close(got.delta, want, **CLOSE)
    assert got.variant == variant
    assert got.solve.damping == 1e-3
    assert got.step == (1 if variant == "sif" else len(REMOVED) / N)
    if variant != "if":
        assert got.delta[~case.mask].abs().max() == 0


@pytest.mark.parametrize("variant", ["if", "pif", "fif", "gif", "sif"])
@pytest.mark.parametrize("solver", ["lissa", "cg"])
def test_iterative_solvers(variant: str, solver: str) -> None:
    case = Case("softmax regression")
    got = case.run(
        variant, params=case.mask, solver=solver, damping=0.05, tol=1e-10, max_iter=100_000
    )
    want = dense(case, "fif" if variant == "if" else variant, 0.05, case.mask)
    assert got.solve.converged
    torch.testing.assert_close(got.delta, want, rtol=1e-6, atol=1e-8)


def test_gif_needs_no_definite_hessian() -> None:
    """LiSSA on the normal equations where H + damping I has both signs."""
    case = Case("tanh mlp")
    H = case.derivatives(torch.arange(N))[1]
    assert torch.linalg.eigvalsh(H)[0] < -0.02
    with pytest.raises(fi.SolverDivergence, match="indefinite"):
        case.run("pif", params=case.mask, damping=0.01)
    got = case.run("gif", params=case.mask, damping=0.01, tol=1e-9, max_iter=200_000)
    torch.testing.assert_close(got.delta, dense(case, "gif", 0.01, case.mask), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["if", "pif", "fif", "gif", "sif"])
def test_linear_regression_in_closed_form(variant: str) -> None:
    """H = A^T A / n for each output; no derivative is taken to get it."""
    case = Case("linear regression")
    out = case.y.shape[1]

    def derivatives(rows: Tensor) -> tuple[Tensor, Tensor]:
        x = case.x[rows]
        ones = torch.ones(len(x), 1, dtype=DOUBLE)
        residual = case.model(x).detach() - case.y[rows]
        scale = 2 / (len(x) * out)  # of mse_loss, the mean over rows and outputs
        g = torch.cat([(scale * residual.T @ x).flatten(), scale * residual.sum(0)])
        eye = torch.eye(out, dtype=DOUBLE)
        blocks = [
            [torch.kron(eye, x.T @ x), torch.kron(eye, x.T @ ones)],
            [torch.kron(eye, ones.T @ x), torch.kron(eye, ones.T @ ones)],
        ]
        return g, scale * torch.cat([torch.cat(row, 1) for row in blocks])

    case.derivatives = derivatives  # type: ignore[method-assign]
    params = None if variant == "if" else case.mask
    got = case.run(variant, params=params, solver="cg", damping=1e-3, tol=1e-12, max_iter=1000)
    torch.testing.assert_close(got.delta, dense(case, variant, 1e-3, case.mask), **CLOSE)


class Bowl(nn.Module):
    """A quadratic: losses (theta - t_i)^T D (theta - t_i) / 2, D = C + diag(a_i), C indefinite."""

    def __init__(self, C: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(len(C), dtype=DOUBLE))
        self.register_buffer("C", C)

    def forward(self, inputs: Tensor) -> Tensor:
        a, t = inputs.chunk(2, 1)
        d = self.theta - t
        return ((d @ self.C) * d + a * d * d).sum(1, keepdim=True) / 2


@pytest.mark.parametrize("variant", ["if", "pif", "fif", "gif", "sif"])
@pytest.mark.parametrize("definite", [True, False])
def test_quadratic(variant: str, definite: bool) -> None:
    """Nine parameters, three selected; gradient and Hessian are written down by hand."""
    torch.manual_seed(4)
    p = 9
    C = torch.randn(p, p, dtype=DOUBLE)
    C = C @ C.T / p if definite else (C + C.T) / 2
    a, t = torch.rand(N, p, dtype=DOUBLE) ** 3, torch.randn(N, p, dtype=DOUBLE)
    model, mask = Bowl(C), torch.arange(p) % 3 == 1
    theta = model.theta.detach()

    def derivatives(rows: Tensor) -> tuple[Tensor, Tensor]:
        d = theta - t[rows]
        return (d @ C + a[rows] * d).mean(0), C + a[rows].mean(0).diag()

    case: Any = SimpleNamespace(p=p, derivatives=derivatives)
    if not definite:
        assert torch.linalg.eigvalsh(derivatives(torch.arange(N))[1])[0] < -0.5
    got = fi.influence(
        model,
        lambda outputs, _: outputs.mean(),
        REMOVED,
        (torch.cat([a, t], 1), torch.zeros(N, dtype=DOUBLE)),
        variant=variant,
        params=None if variant == "if" else mask,
        solver="exact",
        damping=1e-3,
    )
    torch.testing.assert_close(got.delta, dense(case, variant, 1e-3, mask), **CLOSE)


def test_pif_and_fif_differ_and_agree_without_a_selection() -> None:
    case = Case("softmax regression")
    options: dict[str, Any] = {"solver": "exact", "damping": 0.01}
    pif, fif = (case.run(v, params=case.mask, **options).delta for v in ("pif", "fif"))
    assert (pif - fif).norm() > 0.1 * fif.norm()
    whole = case.run("if", **options).delta
    for variant in ("pif", "fif", "gif"):
        torch.testing.assert_close(case.run(variant, **options).delta, whole, **CLOSE)


@pytest.mark.parametrize("kind", ["names", "module", "mask"])
def test_selections(kind: str) -> None:
    case = Case("tanh mlp")
    mask = torch.zeros(case.p, dtype=torch.bool)
    mask[25:] = True
    params = {"names": ["2.*"], "module": case.model[2], "mask": mask}[kind]
    for variant in ("pif", "fif", "gif", "sif"):
        got = case.run(variant, params=params, solver="exact", damping=1e-2)
        torch.testing.assert_close(got.delta, dense(case, variant, 1e-2, mask), **CLOSE)


def test_subset_weights_enter_every_variant() -> None:
    case = Case("linear regression")
    rows = torch.tensor([0, 3, 3, 9, 20, 31, 44])
    weights = torch.tensor([0.1, 0.1, 0.2, 0.1, 0.2, 0.2, 0.1])
    sampler = SimpleNamespace(indices=rows, weights=weights)
    H = sum(
        float(w) * case.derivatives(rows[i : i + 1])[1] for i, w in enumerate(weights.double())
    ) + 0.1 * torch.eye(case.p, dtype=DOUBLE)
    g = case.derivatives(REMOVED)[0]
    got = case.run("pif", params=case.mask, sampler=sampler, solver="exact", damping=0.1)
    want = torch.where(case.mask, torch.linalg.solve(H, g), 0.0)
    torch.testing.assert_close(got.delta, want, rtol=1e-5, atol=1e-7)


class TestQuadratic:
    """The table in the docstring of fastif_ext.variants.second_order."""

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([0.625], dtype=DOUBLE))

        def forward(self, a: Tensor) -> Tensor:
            return a.sqrt() * self.theta

    @staticmethod
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean() / 2

    def run(self, **options: Any) -> float:
        a = torch.tensor([[1.0], [1.0], [1.0], [5.0]], dtype=DOUBLE)
        targets = a.sqrt() * torch.tensor([[0.0], [0.0], [0.0], [1.0]], dtype=DOUBLE)
        got = fi.influence(
            self.Point(), self.loss, torch.tensor([3]), (a, targets),
            solver="exact", damping=0.0, **options,
        )  # fmt: skip
        return float(got.delta[0] * got.step)

    def test_by_hand(self) -> None:
        r, H, H_U, g = 1 / 3, 2.0, 5.0, 5 * (0.625 - 1)
        one, two = r * g / H, r / H * (H - H_U) * r * g / H
        assert one == pytest.approx(-0.3125)
        assert self.run() == pytest.approx(-0.234375)
        assert self.run(variant="sif") == pytest.approx(one + two) == pytest.approx(-0.15625)
        assert one - two == pytest.approx(-0.46875)
        squared = r / H**2 * (H - H_U) * one  # what the authors' code computes for I2
        assert one + squared == pytest.approx(-0.234375)

    def test_the_retain_form_is_retraining(self) -> None:
        kept = SimpleNamespace(indices=torch.arange(3), weights=torch.full((3,), 1 / 3))
        delta = self.run(sampler=kept) * 4 / 3  # n_c / (n - n_c) in place of n_c / n
        assert delta == pytest.approx(-0.625, rel=1e-6)


class TestCurvatures:
    def test_gauss_newton(self) -> None:
        case = Case("tanh mlp")
        got = case.run("if", curvature="gauss-newton", solver="cg", damping=1e-2, tol=1e-10)
        G = fi.GaussNewton(case.model, (case.x, case.y)) @ torch.eye(case.p, dtype=DOUBLE)
        A = G + 1e-2 * torch.eye(case.p, dtype=DOUBLE)
        want = torch.linalg.solve(A, case.derivatives(REMOVED)[0])
        torch.testing.assert_close(got.delta, want, rtol=1e-6, atol=1e-8)

    def test_linear_softmax_is_the_hessian_of_the_head(self) -> None:
        case = Case("tanh mlp")
        options: dict[str, Any] = {"solver": "cg", "damping": 1e-2, "tol": 1e-11}
        want = case.run("if", params=case.model[2], **options)
        sampler = fi.RandomSampler(N, 40)
        for chosen in (None, ["2.*"]):
            got = case.run("if", params=chosen, curvature="linear-softmax", **options)
            torch.testing.assert_close(got.delta, want.delta, rtol=1e-6, atol=1e-9)
        a, b = (
            case.run("sif", params=["2.*"], curvature=c, sampler=sampler, **options).delta
            for c in ("hessian", "linear-softmax")
        )
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)

    def test_linear_softmax_is_refused_where_it_does_not_hold(self) -> None:
        case = Case("tanh mlp")
        with pytest.raises(ValueError, match=r"last nn.Linear, params=.*got 0.weight"):
            case.run("if", params=["0.*"], curvature="linear-softmax")
        with pytest.raises(ValueError, match="'gif' needs the curvature of all parameters"):
            case.run("gif", curvature="linear-softmax")
        with pytest.raises(ValueError, match="needs cross-entropy"):
            Case("linear regression").run("if", curvature="linear-softmax")
        with pytest.raises(ValueError, match="curvature must be one of .* got 'fisher'"):
            case.run("if", curvature="fisher")


def test_removed_sampler_stands_for_the_removed_set() -> None:
    """All its rows with weight 1/m is the set itself; otherwise the weighted gradient."""
    case = Case("softmax regression")
    options: dict[str, Any] = {"solver": "exact", "damping": 1e-2}
    whole = case.run("if", **options)
    same = case.run("if", removed_sampler=fi.AllRows(len(REMOVED)), **options)
    torch.testing.assert_close(same.delta, whole.delta, rtol=1e-6, atol=1e-9)
    one = SimpleNamespace(indices=torch.tensor([2]), weights=torch.tensor([0.5]))
    got = case.run("if", removed_sampler=one, **options)
    g = case.derivatives(REMOVED[2:3])[0]
    torch.testing.assert_close(got.gradient, 0.5 * g)
    assert got.step == len(REMOVED) / N
    with pytest.raises(ValueError, match=r"removed_sampler.indices must lie in \[0, 9\)"):
        case.run("if", removed_sampler=fi.RandomSampler(N, 20), **options)


def test_sif_with_everything_removed() -> None:
    case = Case("softmax regression")
    with pytest.raises(ValueError, match="'sif' needs points that stay"):
        fi.influence(
            case.model, case.loss, torch.arange(N), (case.x, case.y), variant="sif", damping=0.1
        )
