"""LiSSA, CG and the dense solver against torch.linalg, on systems that break peers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastif_ext as fi
from fastif_ext.spectrum import automatic_damping, spectrum

pytestmark = pytest.mark.usefixtures("one_thread")

DOUBLE = torch.float64
Solver = Callable[..., fi.SolveResult]
ITERATIVE = [fi.lissa, fi.cg]
ALL = [*ITERATIVE, fi.exact]


def matrix(eigenvalues: list[float] | Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(eigenvalues, dtype=DOUBLE)
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=DOUBLE)).Q
    return Q @ torch.diag(values) @ Q.T


def psd(p: int = 30) -> Tensor:
    return matrix(torch.logspace(-1, 1, p))


class Counted:
    """An operator that is nothing but `@`, and counts its products."""

    def __init__(self, H: Tensor) -> None:
        self.H, self.products_made = H, 0

    def __matmul__(self, v: Tensor) -> Tensor:
        assert v.dim() == 2
        self.products_made += 1
        return v @ self.H


@pytest.mark.parametrize("solver", ALL)
class TestAgainstLinalg:
    @pytest.mark.parametrize("damping", [0.0, 1e-3, 0.5])
    @pytest.mark.parametrize("R", [None, 1, 5])
    def test_solution_and_true_residual(
        self, solver: Solver, R: int | None, damping: float
    ) -> None:
        H = psd()
        b = torch.randn(*([] if R is None else [R]), 30, dtype=DOUBLE)
        options = {} if solver is fi.exact else {"max_iter": 5000}
        got = solver(Counted(H), b, damping=damping, tol=1e-9, **options)
        A = H + damping * torch.eye(30, dtype=DOUBLE)
        want = torch.linalg.solve(A, b.T if R else b)
        torch.testing.assert_close(got.x, want.T if R else want, rtol=1e-6, atol=1e-8)
        assert got.converged
        assert got.damping == damping
        r = b - got.x @ A
        expected = r.norm(dim=-1) / b.norm(dim=-1)
        torch.testing.assert_close(got.residual, expected, rtol=1e-2, atol=1e-12)
        assert got.residual.shape == b.shape[:-1]

    def test_zero_right_hand_sides(self, solver: Solver) -> None:
        b = torch.zeros(3, 30, dtype=DOUBLE)
        b[1, 4] = 1
        got = solver(psd(), b, tol=1e-8)
        assert torch.equal(got.x[0], torch.zeros(30, dtype=DOUBLE))
        assert got.residual[0] == got.residual[2] == 0
        assert got.converged

    def test_dead_parameters(self, solver: Solver) -> None:
        """Rows of H that are zero, as for a constant pixel; one right-hand side is zero there."""
        H = torch.zeros(40, 40, dtype=DOUBLE)
        H[:30, :30] = psd()
        b = torch.randn(2, 40, dtype=DOUBLE)
        b[0, 30:] = 0
        got = solver(H, b, damping=0.1, tol=1e-8)
        torch.testing.assert_close(got.x[:, 30:], b[:, 30:] / 0.1, rtol=1e-6, atol=1e-7)
        assert got.converged

    def test_automatic_damping_makes_it_definite(self, solver: Solver) -> None:
        H = matrix([-0.5, 0.1, 1.0, 2.0, 10.0])
        b = torch.randn(5, dtype=DOUBLE)
        got = solver(H, b, damping="auto", tol=1e-8)
        assert got.damping == pytest.approx(1.0, rel=1e-6)  # twice the negative eigenvalue
        torch.testing.assert_close(
            got.x, torch.linalg.solve(H + torch.eye(5, dtype=DOUBLE), b), rtol=1e-5, atol=1e-7
        )
        definite = solver(psd(), torch.randn(30, dtype=DOUBLE), damping="auto", tol=1e-6)
        assert definite.damping == pytest.approx(0.1, rel=0.02)  # 1 % of the largest, 10

    def test_inputs_are_left_alone(self, solver: Solver) -> None:
        H, b = psd(), torch.randn(2, 30, dtype=DOUBLE)
        H0, b0, rng = H.clone(), b.clone(), torch.get_rng_state()
        solver(H, b, damping=0.1)
        assert torch.equal(H, H0)
        assert torch.equal(b, b0)
        assert torch.equal(torch.get_rng_state(), rng)

    def test_bad_input(self, solver: Solver) -> None:
        H, b = psd(), torch.randn(30, dtype=DOUBLE)
        for bad, message in (
            (torch.randn(2, 2, 30), r"b must be .*\[p\] or \[R, p\], got \[2, 2, 30\]"),
            (torch.ones(30, dtype=torch.int64), "floating-point"),
            (b * torch.nan, "NaN or infinite"),
        ):
            with pytest.raises(ValueError, match=message):
                solver(H, bad)
        with pytest.raises(ValueError, match="damping must not be negative, got -1"):
            solver(H, b, damping=-1.0)
        with pytest.raises(ValueError, match="number or 'auto', got 'much'"):
            solver(H, b, damping="much")


@pytest.mark.parametrize("solver", ITERATIVE)
class TestIterative:
    def test_too_few_iterations_warn_and_say_so(self, solver: Solver) -> None:
        with pytest.warns(UserWarning, match="residual .* after 3 iterations, tol is 1.00e-05"):
            got = solver(psd(), torch.randn(30, dtype=DOUBLE), max_iter=3)
        assert not got.converged
        assert got.iterations == 3
        assert got.residual > 1e-5

    def test_float32_stagnation_is_not_called_converged(self, solver: Solver) -> None:
        H = matrix(torch.logspace(-4, 4, 40)).float()
        with pytest.warns(UserWarning, match="float32"):
            got = solver(H, torch.randn(40), tol=1e-12, max_iter=300)
        assert not got.converged

    def test_indefinite_names_the_damping_that_works(self, solver: Solver) -> None:
        H = matrix([-0.3, 0.5, 1.0, 4.0])
        b = torch.ones(4, dtype=DOUBLE)
        with pytest.raises(fi.SolverDivergence, match=r"indefinite.*damping > 0.3") as error:
            solver(H, b, damping=0.1)
        assert "'auto' takes 0.6" in str(error.value)
        got = solver(H, b, damping=0.6, tol=1e-8)
        want = torch.linalg.solve(H + 0.6 * torch.eye(4, dtype=DOUBLE), b)
        torch.testing.assert_close(got.x, want, rtol=1e-5, atol=1e-7)

    def test_non_finite_products(self, solver: Solver) -> None:
        H = psd()
        H[3, 4] = H[4, 3] = torch.nan
        with pytest.raises(fi.SolverDivergence, match="not finite"):
            solver(H, torch.ones(30, dtype=DOUBLE))

    def test_bad_numbers(self, solver: Solver) -> None:
        b = torch.ones(30, dtype=DOUBLE)
        with pytest.raises(ValueError, match="tol must be positive, got 0"):
            solver(psd(), b, tol=0.0)
        with pytest.raises(ValueError, match="max_iter must be at least 1, got 0"):
            solver(psd(), b, max_iter=0)


class TestLissa:
    def test_same_answer_for_any_scale(self) -> None:
        H, b = psd(), torch.randn(2, 30, dtype=DOUBLE)
        want = torch.linalg.solve(H + 0.2 * torch.eye(30, dtype=DOUBLE), b.T).T
        for scale in ("auto", 6.0, 11.0, 50.0):
            got = fi.lissa(H, b, damping=0.2, scale=scale, tol=1e-8, max_iter=20_000)
            torch.testing.assert_close(got.x, want, rtol=1e-5, atol=1e-7)
            assert scale == "auto" or got.scale == scale

    def test_history_is_the_true_residual_of_each_iterate(self) -> None:
        """The update I_{k+1} - I_k is the residual of I_k / scale, for any damping and scale."""
        H, b = psd(), torch.randn(30, dtype=DOUBLE)
        got = fi.lissa(H, b, damping=0.2, scale=8.0, tol=1e-6)
        A, iterate = H + 0.2 * torch.eye(30, dtype=DOUBLE), b.clone()
        for recorded in got.history[:20]:
            residual = (b - A @ iterate / 8.0).norm() / b.norm()
            assert recorded == pytest.approx(float(residual), rel=1e-9)
            iterate = b + iterate - A @ iterate / 8.0

    def test_too_small_a_scale_is_mended(self) -> None:
        """Contraction needs 2 scale > 10.2; at 1 the recursion blows up."""
        H, b = psd(), torch.randn(30, dtype=DOUBLE)
        got = fi.lissa(H, b, damping=0.2, scale=1.0, tol=1e-8)
        assert got.converged
        assert got.scale is not None
        assert 2 * got.scale > 10.2

    def test_negative_curvature_that_lanczos_is_not_asked_about(self) -> None:
        """A given scale skips Lanczos; growth, not NaN, is what must be noticed."""
        H = matrix([-2.0, 1.0, 3.0])
        with pytest.raises(fi.SolverDivergence, match="damping > 2"):
            fi.lissa(H, torch.ones(3, dtype=DOUBLE), scale=3.0, max_iter=10_000)

    def test_automatic_scale_is_fast(self) -> None:
        """Within a tenth of the contraction rate of the best scale, the middle of the spectrum."""
        H, b = psd(), torch.randn(30, dtype=DOUBLE)
        auto = fi.lissa(H, b, tol=1e-6, max_iter=5000, acceleration=None)
        best = fi.lissa(H, b, scale=(10 + 0.1) / 2, tol=1e-6, max_iter=5000)
        assert auto.iterations <= 1.1 * best.iterations + 5

    def test_products_are_used_where_there_are(self) -> None:
        H = psd()

        class Listed(Counted):
            def products(self, v: Tensor) -> list[Tensor]:
                self.products_made += 1000
                p = v @ self.H
                return [p[:, :12].reshape(-1, 3, 4), p[:, 12:]]

        b = torch.randn(3, 30, dtype=DOUBLE)
        operator = Listed(H)
        got = fi.lissa(operator, b, damping=0.1, tol=1e-8)
        assert operator.products_made > 1000
        torch.testing.assert_close(
            got.x @ (H + 0.1 * torch.eye(30, dtype=DOUBLE)), b, rtol=1e-6, atol=1e-6
        )

    def test_fresh_subsets_beat_one_subset(self) -> None:
        """METHOD's finding: resampling with tail averaging cuts the error of a fixed subset.

        H is the mean of 400 rank-one terms; each subset has 20 of them.
        """
        g = torch.Generator().manual_seed(0)
        X = torch.randn(400, 8, generator=g, dtype=DOUBLE)
        H, b = X.T @ X / 400, torch.randn(8, generator=g, dtype=DOUBLE)
        want = torch.linalg.solve(H + 0.1 * torch.eye(8, dtype=DOUBLE), b)

        def subset(seed: int) -> Tensor:
            rows = X[torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:20]]
            return rows.T @ rows / 20

        def error(x: Tensor) -> float:
            return float((x - want).norm() / want.norm())

        fixed = [error(fi.cg(subset(s), b, damping=0.1, tol=1e-8).x) for s in range(20)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its residual on H is that of a noisy average
            fresh = [
                error(
                    fi.lissa(
                        H,
                        b,
                        damping=0.1,
                        scale=10.0,
                        max_iter=400,
                        resample=lambda k, run=run: subset(1000 * run + k),
                    ).x
                )
                for run in range(5)
            ]
        assert sum(fresh) / len(fresh) < 0.5 * sum(fixed) / len(fixed)

    def test_progress_prints_nothing_on_stdout(self, capsys: pytest.CaptureFixture[str]) -> None:
        fi.lissa(psd(), torch.ones(30, dtype=DOUBLE), progress=True)
        fi.cg(psd(), torch.ones(30, dtype=DOUBLE), progress=True)
        assert capsys.readouterr().out == ""

    def test_bad_scale_and_average(self) -> None:
        b = torch.ones(30, dtype=DOUBLE)
        for scale in (0.0, -1.0, "big"):
            with pytest.raises(ValueError, match="scale must be positive or 'auto'"):
                fi.lissa(psd(), b, scale=scale)
        with pytest.raises(ValueError, match="average must be between 0 and 1, got 2"):
            fi.lissa(psd(), b, average=2.0)


class TestCg:
    def test_right_hand_sides_of_different_difficulty(self) -> None:
        """One is an eigenvector (one step), one is hard: neither disturbs the other."""
        H = psd()
        values, vectors = torch.linalg.eigh(H)
        b = torch.stack([vectors[:, 3], torch.randn(30, dtype=DOUBLE), 1e-8 * vectors[:, 7]])
        got = fi.cg(H, b, tol=1e-10)
        torch.testing.assert_close(got.x @ H, b, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(got.x[2], b[2] / values[7], rtol=1e-8, atol=0)

    def test_one_product_per_iteration_and_one_for_the_residual(self) -> None:
        operator = Counted(psd())
        got = fi.cg(operator, torch.randn(4, 30, dtype=DOUBLE))
        assert operator.products_made == got.iterations + 1


class TestExact:
    def test_indefinite_is_solved_and_singular_refused(self) -> None:
        H = matrix([-1.0, 2.0, 3.0])
        b = torch.ones(3, dtype=DOUBLE)
        torch.testing.assert_close(fi.exact(H, b).x, torch.linalg.solve(H, b))
        with pytest.raises(ValueError, match="singular with damping 0"):
            fi.exact(torch.zeros(3, 3, dtype=DOUBLE), b)

    def test_size_guard(self) -> None:
        with pytest.raises(ValueError, match=r"20001 parameters .* Use cg or lissa"):
            fi.exact(None, torch.ones(20_001))


class TestSpectrum:
    @settings(max_examples=30, deadline=None)
    @given(
        st.lists(st.floats(-10, 10).filter(lambda v: abs(v) > 1e-3), min_size=1, max_size=25),
        st.integers(0, 100),
    )
    def test_ends(self, eigenvalues: list[float], seed: int) -> None:
        H = matrix(eigenvalues, seed)
        ends = spectrum(H, H[0])
        size = max(map(abs, eigenvalues))
        assert ends.smallest == pytest.approx(min(eigenvalues), abs=1e-4 * size)
        assert ends.largest == pytest.approx(max(eigenvalues), abs=1e-4 * size)
        damped = min(eigenvalues) + automatic_damping(ends)
        assert damped > 0

    def test_large_matrix_bounds(self) -> None:
        """From thirty products on 400 eigenvalues: the top is bounded, the sign is seen."""
        H = matrix(torch.cat([torch.tensor([-0.2]), torch.linspace(0, 5, 399)]))
        ends = spectrum(H, H[0])
        assert 4.99 <= ends.largest < 5.3
        assert -0.2 <= ends.smallest < -0.1


def test_solvers_agree_on_a_network() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    ).double()
    x, y = torch.randn(60, 6, dtype=DOUBLE), torch.randint(3, (60,))
    H: Any = fi.Hessian(model, torch.nn.functional.cross_entropy, (x, y))
    b = torch.randn(4, H.dim, dtype=DOUBLE)
    want = fi.exact(H, b, damping=0.5).x
    for solver in ITERATIVE:
        got = solver(H, b, damping=0.5, tol=1e-9, max_iter=5000)
        torch.testing.assert_close(got.x, want, rtol=1e-6, atol=1e-8)
