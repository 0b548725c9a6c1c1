"""LiSSA: its history, its scale, divergence, resampling. See test_solvers.py too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastif_ext as fi

pytestmark = pytest.mark.usefixtures("one_thread")


def symmetric(low: float, high: float, p: int = 30) -> Tensor:
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(p, p, generator=g, dtype=torch.float64))[0]
    A = Q @ torch.diag(torch.linspace(low, high, p, dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2


def sides(R: int, p: int = 30) -> Tensor:
    g = torch.Generator().manual_seed(R)
    return torch.randn(R, p, generator=g, dtype=torch.float64)


def test_history_is_the_true_residual_of_every_iterate() -> None:
    A, b, lam, s = symmetric(0.1, 5), sides(3), 0.05, 4.0
    result = fi.lissa(A, b, damping=lam, scale=s, tol=1e-4)
    iterate, expected = b.clone(), []
    for _ in range(result.iterations):
        x = iterate / s
        expected.append(float(((b - x @ A - lam * x).norm(dim=1) / b.norm(dim=1)).max()))
        iterate = b + iterate - (iterate @ A + lam * iterate) / s
    assert result.history == pytest.approx(expected, rel=1e-9)
    assert result.history[-1] <= 1e-4 < result.history[-2]
    torch.testing.assert_close(result.x, iterate / s)
    assert result.scale == s


@pytest.mark.parametrize("scale", [2.7, 5.0, 50.0, "auto"])
def test_the_scale_sets_the_speed_and_not_the_answer(scale: float | str) -> None:
    A, b = symmetric(0.1, 5), sides(2)
    result = fi.lissa(A, b, damping=0.05, scale=scale, tol=1e-8, max_iter=20000)
    expected = b @ torch.linalg.inv(A + 0.05 * torch.eye(30))
    torch.testing.assert_close(result.x, expected, rtol=1e-6, atol=1e-6)
    if scale != "auto":
        assert result.scale == scale
        best = fi.lissa(A, b, damping=0.05, tol=1e-8, max_iter=20000, acceleration=None)
        assert best.iterations <= 1.1 * result.iterations


@pytest.mark.parametrize("scale", [1e-6, 0.1, 2.0])
def test_too_small_a_scale_restarts_and_is_still_right(scale: float) -> None:
    """curvlinops' Neumann series with scale=1 silently returned an error of 7e6."""
    A, b = symmetric(0.1, 5), sides(2)
    result = fi.lissa(A, b, damping=0.05, scale=scale, tol=1e-8, max_iter=20000)
    assert result.converged
    assert result.scale is not None
    assert result.scale > 2.5
    expected = b @ torch.linalg.inv(A + 0.05 * torch.eye(30))
    torch.testing.assert_close(result.x, expected, rtol=1e-6, atol=1e-6)


def test_slow_growth_is_never_reported_as_convergence() -> None:
    """Growth without NaN: a negative eigenvalue that 30 products cannot tell, few iterations."""
    A, b = symmetric(-0.02, 5), sides(1)
    with pytest.raises(fi.SolverDivergence, match="damping > 0.02"):
        fi.lissa(A, b, scale=3.0, max_iter=5000)
    with pytest.warns(UserWarning, match="residual"):
        assert not fi.lissa(A, b, scale=3.0, max_iter=20).converged


def test_an_operator_that_always_grows() -> None:
    class Growing:
        """Not the same operator from one product to the next."""

        size = 1.0

        def __matmul__(self, v: Tensor) -> Tensor:
            self.size *= 1.2
            return self.size * v

    with pytest.raises(fi.SolverDivergence, match=r"residual grows.*damping='auto'"):
        fi.lissa(Growing(), torch.ones(2), damping=0.01, scale=1.0)


def test_an_operator_that_turns_to_nan() -> None:
    class Failing:
        calls = 0

        def __matmul__(self, v: Tensor) -> Tensor:
            self.calls += 1
            return v * (float("nan") if self.calls > 50 else 1.0)

    with pytest.raises(fi.SolverDivergence, match="not finite"):
        fi.lissa(Failing(), torch.ones(2), damping=0.0, scale=100.0)


def test_one_product_per_step_and_products_is_preferred() -> None:
    A, b = symmetric(0.1, 5), sides(2)

    class Pieces:
        made = 0

        def __matmul__(self, v: Tensor) -> Tensor:
            return v @ A

        def products(self, v: Tensor) -> list[Tensor]:
            self.made += 1
            full = v @ A
            return [full[:, :12].reshape(-1, 3, 4), full[:, 12:]]

    H = Pieces()
    result = fi.lissa(H, b, damping=0.05, tol=1e-6)
    assert H.made == result.iterations
    assert torch.allclose(result.x, fi.lissa(A, b, damping=0.05, tol=1e-6).x)


def test_the_right_hand_side_is_not_overwritten() -> None:
    A, b = symmetric(0.1, 5), sides(2)
    before = b.clone()
    transposed = b.T.contiguous().T
    result = fi.lissa(A, transposed, damping=0.05)
    assert torch.equal(transposed, before)
    assert torch.equal(fi.lissa(A, b, damping=0.05).x, result.x)
    assert torch.equal(b, before)


class TestAcceleration:
    def test_takes_about_the_square_root_of_the_steps(self) -> None:
        A, b = symmetric(0.02, 5, p=200), sides(3, p=200)
        plain = fi.lissa(A, b, tol=1e-6, max_iter=20000, acceleration=None)
        fast = fi.lissa(A, b, tol=1e-6)
        assert fast.converged
        torch.testing.assert_close(fast.x, plain.x, rtol=1e-3, atol=1e-3)
        # For kappa = 250 the bounds are log(2/tol) sqrt(kappa)/2 = 115 and log(1/tol) kappa/2.
        assert plain.iterations > 1000
        assert fast.iterations < 150

    def test_history_is_the_true_residual_of_the_accelerated_iterates(self) -> None:
        A, b, lam = symmetric(0.1, 5), sides(2), 0.05
        for steps in (1, 2, 3, 7):
            with pytest.warns(UserWarning, match="residual"):
                result = fi.lissa(A, b, damping=lam, tol=1e-9, max_iter=steps)
            with pytest.warns(UserWarning, match="residual"):
                longer = fi.lissa(A, b, damping=lam, tol=1e-9, max_iter=steps + 1)
            assert longer.history[-1] == pytest.approx(float(result.residual.max()), rel=1e-9)
            assert longer.history[:-1] == result.history

    @pytest.mark.parametrize("seed", range(8))
    def test_what_is_returned_has_the_residual_that_ended_the_steps(self, seed: int) -> None:
        """The last step's own residual may be above tol again."""
        A, b = symmetric(0.1, 5, p=60), sides(seed + 1, p=60)
        for tol in (1e-1, 1e-2, 1e-3):
            result = fi.lissa(A, b, damping=0.05, tol=tol)
            assert result.converged
            assert float(result.residual.max()) == pytest.approx(result.history[-1], rel=1e-6)

    def test_eigenvalues_below_what_lanczos_saw(self) -> None:
        """One tiny eigenvalue among 2,000 others, of which 30 products know nothing."""
        values = torch.linspace(1, 5, 2000, dtype=torch.float64)
        values[7] = 0.02
        b = sides(2, p=2000)
        result = fi.lissa(values.diag(), b, tol=1e-6, max_iter=3000)
        assert result.converged
        torch.testing.assert_close(result.x, b / values, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("scale", [0.1, 2.0, 2.7, 40.0])
    def test_any_scale_gives_the_answer(self, scale: float) -> None:
        A, b = symmetric(0.1, 5), sides(2)
        result = fi.lissa(
            A, b, damping=0.05, scale=scale, tol=1e-8, max_iter=5000, acceleration="chebyshev"
        )
        assert result.converged
        plain = fi.lissa(A, b, damping=0.05, scale=scale, tol=1e-8, max_iter=20000)
        assert result.iterations < plain.iterations
        expected = b @ torch.linalg.inv(A + 0.05 * torch.eye(30))
        torch.testing.assert_close(result.x, expected, rtol=1e-6, atol=1e-6)

    def test_is_refused_where_it_keeps_the_noise(self) -> None:
        A, b = symmetric(0.1, 5), sides(1)
        for more in ({"average": 0.5}, {"resample": lambda k: A}):
            with pytest.raises(ValueError, match="acceleration='chebyshev' needs a fixed subset"):
                fi.lissa(A, b, acceleration="chebyshev", **more)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="must be 'auto', 'chebyshev' or None, got 'nesterov'"):
            fi.lissa(A, b, acceleration="nesterov")


def test_averaging_a_fixed_operator() -> None:
    A, b, s = symmetric(0.5, 2), sides(1), 3.0
    with pytest.warns(UserWarning, match="residual"):
        result = fi.lissa(A, b, scale=s, max_iter=10, average=0.3, tol=1e-12)
    iterate, kept = b.clone(), []
    for _ in range(10):
        iterate = b + iterate - iterate @ A / s
        kept.append(iterate)
    torch.testing.assert_close(result.x, sum(kept[-3:]) / 3 / s)
    assert result.iterations == 10


class TestResample:
    """METHOD.md, finding 8, on a softmax regression with n = 400, subsets of m = 20."""

    N, M, DAMPING = 400, 20, 0.05

    def setting(self) -> tuple[Any, Tensor, Tensor, fi.Hessian]:
        torch.manual_seed(0)
        x = torch.randn(self.N, 6, dtype=torch.float64)
        y = (x[:, :3] + 0.5 * torch.randn(self.N, 3)).argmax(1)
        model = nn.Linear(6, 3, dtype=torch.float64)
        full = fi.Hessian(model, F.cross_entropy, (x, y))
        b = fi.mean_gradient(model, F.cross_entropy, (x[:30], y[:30]))

        def subset(seed: int) -> fi.Hessian:
            rows = torch.randperm(self.N, generator=torch.Generator().manual_seed(seed))[: self.M]
            return fi.Hessian(model, F.cross_entropy, (x[rows], y[rows]))

        return subset, b, fi.exact(full, b, damping=self.DAMPING).x, full

    @pytest.mark.filterwarnings("ignore:lissa. residual")
    def test_beats_fixed_subsets_and_improves_with_steps(self) -> None:
        subset, b, expected, full = self.setting()

        def error(x: Tensor) -> float:
            return float((x - expected).norm() / expected.norm())

        fixed = [
            error(fi.lissa(subset(seed), b, damping=self.DAMPING, tol=1e-6).x) for seed in range(8)
        ]
        fresh = {
            steps: [
                error(
                    fi.lissa(
                        full,
                        b,
                        damping=self.DAMPING,
                        max_iter=steps,
                        resample=lambda k, run=run: subset(10_000 * (run + 1) + k),
                    ).x
                )
                for run in range(2)
            ]
            for steps in (60, 400)
        }
        # measured: fixed .47 to 1.14, fresh .06 to .10 after 60 steps and .03 to .04 after 400
        assert max(fresh[400]) < 0.2 * min(fixed)
        assert max(fresh[400]) < min(fresh[60])

    @pytest.mark.filterwarnings("ignore:lissa. residual")
    def test_the_residual_refers_to_the_whole_operator(self) -> None:
        subset, b, _, full = self.setting()
        steps: list[int] = []

        def resample(k: int) -> fi.Hessian:
            steps.append(k)
            return subset(k)

        result = fi.lissa(full, b, damping=self.DAMPING, max_iter=30, resample=resample, tol=0.5)
        assert steps == list(range(30))
        assert result.iterations == 30
        true = (b - full @ result.x - self.DAMPING * result.x).norm() / b.norm()
        assert float(result.residual) == pytest.approx(float(true))


class TestBadArguments:
    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), "large"])
    def test_scale(self, scale: Any) -> None:
        with pytest.raises(ValueError, match="scale must be positive or 'auto', got"):
            fi.lissa(symmetric(1, 2), sides(1), scale=scale)

    @pytest.mark.parametrize("average", [0.0, -0.5, 1.5, float("nan")])
    def test_average(self, average: float) -> None:
        with pytest.raises(ValueError, match="average must be between 0 and 1"):
            fi.lissa(symmetric(1, 2), sides(1), average=average)

    def test_operator_of_another_size(self) -> None:
        model = nn.Linear(3, 3)
        H = fi.Hessian(model, F.cross_entropy, (torch.ones(2, 3), torch.zeros(2).long()))
        with pytest.raises(ValueError, match=r"\[12\].*\[1, 5\]"):
            fi.lissa(H, torch.ones(5), damping=0.1, scale=1.0)
        with pytest.raises(ValueError, match="float64"):
            fi.lissa(H, torch.ones(12).double(), damping=0.1, scale=1.0)


@pytest.mark.parametrize("solver", [fi.lissa, fi.cg])
def test_autograd_memory_does_not_grow_with_the_depth(solver: Any) -> None:
    """nimarb keeps the graph through the recursion: depth 10 took 2.3 GB there."""
    alive: list[Any] = []

    class Graphless:
        def __matmul__(self, v: Tensor) -> Tensor:
            alive.append(v.requires_grad or v.grad_fn is not None)
            return 2 * v

    solver(Graphless(), torch.ones(3, requires_grad=True), damping=0.1)
    assert alive
    assert not any(alive)
