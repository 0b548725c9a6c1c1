"""cg, exact and what all solvers share, against torch.linalg in float64 at small damping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastif_ext as fi
from fastif_ext.spectrum import Lanczos, automatic_damping, resolve_damping, spectrum

pytestmark = pytest.mark.usefixtures("one_thread")

SOLVERS = [fi.cg, fi.exact, fi.lissa]
P = 40


def symmetric(*, low: float = 0.05, high: float = 10.0, p: int = P, seed: int = 0) -> Tensor:
    """A symmetric float64 matrix with evenly spread eigenvalues from low to high."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(p, p, generator=g, dtype=torch.float64))[0]
    A = Q @ torch.diag(torch.linspace(low, high, p, dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2


def sides(R: int, p: int = P) -> Tensor:
    g = torch.Generator().manual_seed(R)
    return torch.randn(R, p, generator=g, dtype=torch.float64)


def solution(A: Tensor, b: Tensor, damping: float) -> Tensor:
    inverse = torch.linalg.inv(A + damping * torch.eye(len(A), dtype=A.dtype))
    return b @ inverse


class Counting:
    """An operator that is no tensor and counts its products."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.products_made = A, 0

    def __matmul__(self, v: Tensor) -> Tensor:
        self.products_made += 1
        return v @ self.A


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("R", [None, 1, 5])
@pytest.mark.parametrize("solver", SOLVERS)
def test_equals_dense_solve(solver: Any, R: int | None, damping: float) -> None:
    A = symmetric()
    b = sides(1)[0] if R is None else sides(R)
    for H in (A, Counting(A)):
        result = (
            solver(H, b, damping=damping, tol=1e-9, max_iter=20000)
            if (solver is not fi.exact)
            else solver(H, b, damping=damping, tol=1e-9)
        )
        assert result.converged
        assert result.x.shape == b.shape
        assert result.residual.shape == b.shape[:-1]
        assert result.damping == damping
        torch.testing.assert_close(result.x, solution(A, b, damping), rtol=1e-6, atol=1e-7)
        difference = b - result.x @ A - damping * result.x
        true = difference.norm(dim=-1) / b.norm(dim=-1)
        torch.testing.assert_close(result.residual, true, rtol=1e-2, atol=1e-15)
        assert (result.residual <= 1e-9).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_right_hand_sides(solver: Any) -> None:
    A, b = symmetric(), sides(3)
    b[1] = 0
    result = solver(A, b, damping=0.1, tol=1e-6)
    assert result.converged
    assert not result.x[1].any()
    assert result.residual[1] == 0
    torch.testing.assert_close(result.x, solution(A, b, 0.1), rtol=1e-4, atol=1e-5)
    nothing = solver(A, torch.zeros(P, dtype=torch.float64), damping=0.1)
    assert nothing.converged
    assert not nothing.x.any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_dead_parameters(solver: Any) -> None:
    """A dead input column: pyDVL's elementwise stopping rule divides 0 by 0 there."""
    A, b = symmetric(), sides(2)
    dead = torch.arange(0, P, 3)
    A[dead], A[:, dead], b[:, dead] = 0, 0, 0
    result = solver(A, b, damping=0.1, tol=1e-6)
    assert result.converged
    assert result.iterations < 500
    assert not result.x[:, dead].any()
    torch.testing.assert_close(result.x, solution(A, b, 0.1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_tiny_and_huge_right_hand_sides(solver: Any, size: float) -> None:
    A, b = symmetric(), sides(2)
    result = solver(A, b * size, damping=0.1, tol=1e-6)
    assert result.converged
    torch.testing.assert_close(result.x / size, solution(A, b, 0.1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", [fi.cg, fi.lissa])
class TestIndefinite:
    def test_says_which_damping_helps(self, solver: Any) -> None:
        A, b = symmetric(low=-0.5), sides(2)
        with pytest.raises(fi.SolverDivergence, match=r"damping > 0\.5\b.*\(damping='auto'") as e:
            solver(A, b, damping=0.1)
        assert "CurvatureSampler" in str(e.value)
        result = solver(A, b, damping=0.55, tol=1e-6, max_iter=5000)
        assert result.converged
        torch.testing.assert_close(result.x, solution(A, b, 0.55), rtol=1e-3, atol=1e-4)

    def test_automatic_damping(self, solver: Any) -> None:
        A, b = symmetric(low=-0.5), sides(2)
        result = solver(A, b, damping="auto", tol=1e-6)
        assert result.damping == pytest.approx(1.0, rel=0.02)  # twice the negative eigenvalue
        torch.testing.assert_close(result.x, solution(A, b, result.damping), rtol=1e-4, atol=1e-5)

    def test_automatic_damping_of_a_definite_operator(self, solver: Any) -> None:
        result = solver(symmetric(), sides(1), damping="auto")
        assert result.damping == pytest.approx(0.1, rel=0.05)  # 1 % of the largest eigenvalue


def test_exact_solves_an_indefinite_system() -> None:
    A, b = symmetric(low=-0.53), sides(3)
    torch.testing.assert_close(fi.exact(A, b, damping=0.1).x, solution(A, b, 0.1))


def test_exact_refuses_a_singular_system() -> None:
    A = symmetric(low=0.0)
    with pytest.raises(ValueError, match=r"singular with damping 0.*more damping"):
        fi.exact(A, sides(1))
    assert fi.exact(A, sides(1), damping=1e-4).converged


def test_exact_refuses_too_many_parameters() -> None:
    with pytest.raises(ValueError, match=r"20001 .*3 GB.*cg or lissa"):
        fi.exact(Counting(torch.eye(2)), torch.ones(20001))


def test_exact_forms_the_matrix_once() -> None:
    H = Counting(symmetric(p=300))
    result = fi.exact(H, sides(2, 300))
    assert H.products_made == 3  # 256 + 44 unit vectors, and the true residual
    assert result.iterations == 300


def test_cg_ends_within_p_steps() -> None:
    H = Counting(symmetric(p=12))
    result = fi.cg(H, sides(5, 12), tol=1e-10)
    assert result.converged
    assert result.iterations <= 12
    assert H.products_made == result.iterations + 1
    assert len(result.history) == result.iterations


def test_cg_right_hand_sides_do_not_mix() -> None:
    A, b = symmetric(), sides(3) * torch.tensor([[1.0], [1e6], [1e-6]], dtype=torch.float64)
    together = fi.cg(A, b, damping=0.1, tol=1e-10)
    for row, x in zip(b, together.x, strict=True):
        torch.testing.assert_close(fi.cg(A, row, damping=0.1, tol=1e-10).x, x, rtol=1e-7, atol=0)


@pytest.mark.parametrize("solver", [fi.cg, fi.lissa])
class TestUnfinished:
    def test_too_few_iterations(self, solver: Any) -> None:
        A, b = symmetric(), sides(2)
        with pytest.warns(UserWarning, match=r"residual \S+ after 3 iterations.*raise max_iter"):
            result = solver(A, b, max_iter=3)
        assert not result.converged
        assert result.iterations == 3
        true = (b - result.x @ A).norm(dim=1) / b.norm(dim=1)
        torch.testing.assert_close(result.residual, true)
        assert (true > 1e-3).all()

    def test_float32_cannot_do_better_than_its_rounding(self, solver: Any) -> None:
        A, b = symmetric(low=1e-3, high=100.0), sides(1)
        with pytest.warns(UserWarning, match="float32"):
            result = solver(A.float(), b.float(), tol=1e-9, max_iter=400)
        assert not result.converged
        assert result.residual.dtype == torch.float64
        x, low = result.x.double(), 1e-9
        true = (b.float().double() - x @ A.float().double()).norm() / b.float().double().norm()
        assert true > low
        assert float(result.residual) > low


@pytest.mark.parametrize("solver", SOLVERS)
class TestBadArguments:
    def test_operator_that_gives_nan(self, solver: Any) -> None:
        A = symmetric()
        A[3, 5] = float("nan")
        with pytest.raises(fi.SolverDivergence, match="not finite"):
            solver(A, sides(1), damping=0.1)

    @pytest.mark.parametrize(
        ("b", "message"),
        [
            (torch.ones(2, 2, 2), r"\[p\] or \[R, p\], got \[2, 2, 2\]"),
            (torch.tensor(1.0), r"\[p\] or \[R, p\], got \[\]"),
            (torch.ones(P, dtype=torch.int64), "floating-point"),
            ([1.0], "got list"),
            (torch.full((P,), float("nan"), dtype=torch.float64), "NaN"),
            (torch.full((P,), float("inf"), dtype=torch.float64), "infinite"),
            (torch.ones(0, P), r"empty.*\[0, 40\]"),
            (torch.ones(0), "empty"),
        ],
    )
    def test_right_hand_side(self, solver: Any, b: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            solver(symmetric(), b, damping=0.1)

    @pytest.mark.parametrize(
        ("damping", "message"),
        [(-0.1, "negative, got -0.1"), (float("nan"), "nan"), ("big", "'auto', got 'big'")],
    )
    def test_damping(self, solver: Any, damping: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            solver(symmetric(), sides(1), damping=damping)

    @pytest.mark.parametrize("tol", [0.0, -1.0, float("nan")])
    def test_tol(self, solver: Any, tol: float) -> None:
        with pytest.raises(ValueError, match="tol must be positive"):
            solver(symmetric(), sides(1), tol=tol)

    def test_max_iter(self, solver: Any) -> None:
        if solver is not fi.exact:
            with pytest.raises(ValueError, match="max_iter must be at least 1, got 0"):
                solver(symmetric(), sides(1), max_iter=0)


def test_right_hand_side_that_requires_grad() -> None:
    b = sides(1).requires_grad_()
    for solver in SOLVERS:
        assert not solver(symmetric(), b, damping=0.1).x.requires_grad


@pytest.mark.parametrize("solver", [fi.cg, fi.lissa])
def test_progress_goes_to_stderr(solver: Any, capsys: pytest.CaptureFixture[str]) -> None:
    solver(symmetric(), sides(1), damping=0.1, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert solver.__name__ in err
    solver(symmetric(), sides(1), damping=0.1)
    assert capsys.readouterr() == ("", "")


class TestSpectrum:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("low", "high"), [(-3.0, 10.0), (0.0, 5.0), (-10.0, -1.0)])
    def test_ends(self, low: float, high: float, dtype: torch.dtype) -> None:
        A = symmetric(low=low, high=high, p=200).to(dtype)
        ends = spectrum(A, torch.ones(200, dtype=dtype))
        width = high - low
        assert low - 1e-5 * width <= ends.smallest <= low + 0.02 * width
        assert high - 0.02 * width <= ends.largest <= high + 0.05 * width

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_few_distinct_eigenvalues(self, dtype: torch.dtype) -> None:
        A = torch.diag(torch.tensor([0.0, 0, 0, 2, 2, 7, -1], dtype=dtype))
        ends = spectrum(A, torch.ones(7, dtype=dtype))
        assert ends.smallest == pytest.approx(-1, abs=1e-5)
        assert ends.largest == pytest.approx(7, abs=1e-4)

    def test_zero_and_one_parameter(self) -> None:
        assert spectrum(torch.zeros(3, 3), torch.ones(3)) == (0, 0)
        assert spectrum(torch.tensor([[2.0]]), torch.ones(1)) == pytest.approx((2, 2))

    @pytest.mark.parametrize("solver", [fi.cg, fi.lissa])
    def test_a_given_damping_that_is_too_small_is_told_what_is_needed(self, solver: Any) -> None:
        """All steps are made: automatic damping would be settled long before -0.2 is seen."""
        g = torch.Generator().manual_seed(0)
        Q = torch.linalg.qr(torch.randn(400, 400, generator=g, dtype=torch.float64))[0]
        values = torch.cat([torch.tensor([-0.2]), torch.linspace(0, 100, 399)]).double()
        A = Q @ torch.diag(values) @ Q.T
        with pytest.raises(fi.SolverDivergence, match=r"damping > 0\.\d+.*'auto'"):
            solver((A + A.T) / 2, sides(1, 400), damping=0.1, tol=1e-8, max_iter=400)

    def test_leaves_the_global_generator_alone(self) -> None:
        before = torch.get_rng_state()
        first = spectrum(symmetric(), sides(1))
        assert torch.equal(torch.get_rng_state(), before)
        assert spectrum(symmetric(), sides(1)) == first

    def test_automatic_damping_bounds_the_condition_number(self) -> None:
        for low in (-4.0, -0.1, 0.0, 1.0):
            A = symmetric(low=low)
            lam = automatic_damping(spectrum(A, sides(1)))
            assert torch.linalg.cond(A + lam * torch.eye(P, dtype=A.dtype)) < 210

    def test_ends_early_where_damping_is_settled(self) -> None:
        for low, high, most in ((0.5, 10.0, 16), (-2.0, 10.0, 29)):
            H = Counting(symmetric(low=low, high=high, p=300))
            ends = Lanczos(H, sides(1, 300)[0]).ends
            assert 16 <= H.products_made <= most
            damping = max(0.01 * high, -2 * low)
            assert automatic_damping(ends) == pytest.approx(damping, rel=0.1)

    @pytest.mark.parametrize("row", [0, 3, 39])
    def test_sees_beyond_what_a_right_hand_side_reaches(self, row: int) -> None:
        """An eigenvector's steps end at once; those of two of them at the second."""
        A = torch.diag(torch.linspace(-2, 10, P, dtype=torch.float64))
        b = torch.eye(P, dtype=torch.float64)
        for start in (b[row], b[row] + b[20]):
            ends = Lanczos(A, start).ends
            assert ends.smallest == pytest.approx(-2, rel=0.02)
            assert ends.largest == pytest.approx(10, rel=0.02)


class TestOneSearchForDampingAndSolution:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("low", [-0.5, 0.1])
    def test_takes_no_more_products(self, low: float, dtype: torch.dtype) -> None:
        A, b = symmetric(low=low, p=300), sides(1, 300)[0]
        H = Counting(A.to(dtype))
        result = fi.cg(H, b.to(dtype), damping="auto", tol=1e-2)
        assert result.converged
        assert result.iterations <= 30
        assert H.products_made == result.iterations + 1  # the true residual
        assert len(result.history) == result.iterations
        assert result.history[-1] == pytest.approx(float(result.residual), rel=0.05)
        want = solution(A, b, result.damping)
        assert (result.x.double() - want).norm() <= 0.2 * want.norm()

    def test_goes_on_to_a_small_tolerance(self) -> None:
        A, b = symmetric(low=-0.5, p=300), sides(1, 300)
        H = Counting(A)
        result = fi.cg(H, b, damping="auto", tol=1e-10)
        assert result.converged
        assert H.products_made == result.iterations + 2  # and the residual to go on from
        torch.testing.assert_close(result.x, solution(A, b, result.damping))

    def test_every_step_is_the_conjugate_gradients(self) -> None:
        A, b = symmetric(low=-0.5, p=300), sides(1, 300)
        auto = fi.cg(A, b, damping="auto", tol=1e-2)
        same = fi.cg(A, b, damping=auto.damping, tol=float(auto.residual) * 1.2)
        torch.testing.assert_close(auto.x, same.x, rtol=1e-6, atol=1e-8)

    @pytest.mark.filterwarnings("ignore:cg. residual")
    @pytest.mark.parametrize("limit", [1, 5, 16])
    def test_makes_use_of_no_more_steps_than_allowed(self, limit: int) -> None:
        A, b = symmetric(p=300), sides(1, 300)
        result = fi.cg(A, b, damping="auto", tol=1e-12, max_iter=limit)
        assert not result.converged
        assert result.iterations == len(result.history) == limit
        plain = fi.cg(A, b, damping=result.damping, tol=1e-12, max_iter=limit)
        torch.testing.assert_close(result.x, plain.x, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("size", [1e-30, 1e30])
    def test_tiny_and_huge(self, size: float) -> None:
        A, b = symmetric(low=-0.5).float(), sides(1)[0].float() * size
        result = fi.cg(A, b, damping="auto", tol=1e-4)
        assert result.converged
        assert result.residual > 0
        want = solution(A.double(), b.double(), result.damping)
        assert (result.x.double() - want).norm() <= 1e-2 * want.norm()

    def test_nothing_to_solve(self) -> None:
        result = fi.cg(symmetric(low=-0.5), torch.zeros(P, dtype=torch.float64), damping="auto")
        assert result.converged
        assert not result.x.any()
        assert result.damping == pytest.approx(1.0, rel=0.02)

    def test_all_solvers_take_the_same_damping(self) -> None:
        A, b = symmetric(low=-0.5, p=300), sides(1, 300)
        found = {
            solver(A, b, damping="auto", tol=1e-3, max_iter=3000).damping
            for solver in (fi.cg, fi.lissa)
        } | {fi.exact(A, b, damping="auto").damping, resolve_damping(A, b, "auto")[0]}
        assert len(found) == 1

    def test_that_of_several_does_not_depend_on_them(self) -> None:
        A = symmetric(low=-0.5, p=300)
        found = {fi.cg(A, sides(R, 300), damping="auto", tol=1e-3).damping for R in (2, 3, 8)}
        assert found == {automatic_damping(spectrum(A, sides(1, 300)))}
