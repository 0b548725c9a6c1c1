"""Solvers away from the CPU: the same answer, and how seldom the host waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastif_ext as fi
from fastif_ext.device import LOOK_EVERY
from fastif_ext.spectrum import spectrum

pytestmark = pytest.mark.usefixtures("one_thread")

SOLVERS: dict[str, Callable[..., fi.SolveResult]] = {"lissa": fi.lissa, "cg": fi.cg}


def matrix(low: float, high: float, p: int = 40) -> Tensor:
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(p, p, generator=g, dtype=torch.float64))[0]
    A = Q @ torch.diag(torch.linspace(low, high, p, dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2


def sides(R: int = 3, p: int = 40) -> Tensor:
    b = torch.randn(R, p, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    b[0] *= 1e-3
    return b


def one_by_one(*args: Any, **options: Any) -> fi.SolveResult:
    """The steps of every device; on the CPU several right-hand sides make a block."""
    return fi.cg(*args, block=False, **options)


@pytest.mark.parametrize("damping", [0.05, "auto"])
@pytest.mark.parametrize("name", ["lissa", "cg", "exact"])
def test_the_answer_is_that_of_the_cpu(name: str, damping: Any, place: str) -> None:
    solve = {**SOLVERS, "cg": one_by_one, "exact": fi.exact}[name]
    A, b = matrix(0.1, 5), sides()
    want = solve(A, b, damping=damping, tol=1e-8)
    got = solve(A.to(place), b.to(place), damping=damping, tol=1e-8)
    assert got.x.device.type == got.residual.device.type == place
    assert got.converged
    assert got.damping == pytest.approx(want.damping, rel=1e-9)
    assert want.iterations <= got.iterations < want.iterations + LOOK_EVERY
    torch.testing.assert_close(got.x.cpu(), want.x, rtol=1e-6, atol=1e-6)
    assert got.history[: len(want.history)] == pytest.approx(want.history, rel=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("every", [2, 5, 1000])
def test_looking_seldom_changes_no_step(name: str, every: int) -> None:
    A, b = matrix(0.1, 5), sides()
    want = SOLVERS[name](A, b, damping=0.05, tol=1e-6, max_iter=300)
    got = SOLVERS[name](A, b, damping=0.05, tol=1e-6, max_iter=300, check_every=every)
    assert got.converged
    assert got.history[: want.iterations] == want.history
    assert len(got.history) == got.iterations
    if name == "cg":  # what is done after convergence changes nothing and does not count
        assert got.iterations == want.iterations
        assert torch.equal(got.x, want.x)
    else:
        assert want.iterations <= got.iterations <= min(want.iterations + every - 1, 300)
        torch.testing.assert_close(got.x, want.x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("every", [1, 7, 64])
def test_divergence_is_seen_however_seldom_one_looks(every: int) -> None:
    A, b = matrix(0.1, 5), sides()
    restarted = fi.lissa(A, b, damping=0.05, scale=0.1, tol=1e-6, check_every=every, max_iter=3000)
    assert restarted.converged
    assert restarted.scale > 0.1
    indefinite = matrix(-1, 5)
    for solve in SOLVERS.values():
        with pytest.raises(fi.SolverDivergence, match="indefinite"):
            solve(indefinite, b, damping=0.5, check_every=every)
    broken = torch.full((40, 40), torch.nan, dtype=torch.float64)
    with pytest.raises(fi.SolverDivergence, match="not finite"):
        fi.cg(broken, b, damping=0.5, check_every=every)
    with pytest.raises(fi.SolverDivergence, match="not finite"):
        fi.lissa(broken, b, damping=0.5, scale=5.0, check_every=every)


def test_the_tail_is_averaged_alike() -> None:
    A, b = matrix(0.1, 5), sides()
    runs = [
        fi.lissa(A, b, damping=0.05, tol=1e-12, max_iter=50, average=0.3, check_every=every)
        for every in (1, 7)
    ]
    assert torch.equal(runs[0].x, runs[1].x)
    assert runs[0].history == runs[1].history
    assert runs[0].iterations == 50


def test_frozen_sides_and_zero_sides(place: str) -> None:
    A, b = matrix(0.1, 5), sides()
    b[1] = 0
    b[2] = torch.linalg.eigh(A)[1][:, 0]  # solved in one step
    for every in (1, 6):
        got = fi.cg(A.to(place), b.to(place), tol=1e-8, check_every=every)
        torch.testing.assert_close(got.x.cpu(), b @ torch.linalg.inv(A), rtol=1e-6, atol=1e-6)
        assert not got.x[1].cpu().any()
        none = fi.cg(A.to(place), (0 * b).to(place), check_every=every)
        assert none.iterations == 0


@pytest.mark.parametrize("name", SOLVERS)
def test_the_host_waits_once_in_a_few_steps(
    name: str, simulated: Callable[[Tensor], Tensor], traffic: Any
) -> None:
    A, b = simulated(matrix(0.05, 5)), simulated(sides())
    waits = []
    for tol in (1e-3, 1e-9):
        traffic.waits.clear()
        result = SOLVERS[name](A, b, damping=0.01, tol=tol, max_iter=3000)
        waits.append((result.iterations, len(traffic.waits)))
    steps, more = waits[1][0] - waits[0][0], waits[1][1] - waits[0][1]
    assert steps > 3 * LOOK_EVERY / 2
    assert more <= steps / LOOK_EVERY + 1


def test_lanczos_waits_once_in_a_few_steps(
    simulated: Callable[[Tensor], Tensor], traffic: Any
) -> None:
    A = matrix(-1, 5)
    ends = spectrum(simulated(A), simulated(sides()))
    assert len(traffic.waits) <= 30 / LOOK_EVERY + 1
    assert tuple(ends) == pytest.approx(tuple(spectrum(A, sides())), rel=1e-9)


def test_lanczos_ends_at_the_same_step(simulated: Callable[[Tensor], Tensor], traffic: Any) -> None:
    A, b = matrix(-1, 5, 300), sides(1, 300)
    want = fi.cg(A, b, damping="auto", tol=1e-2)
    assert want.iterations in (16, 20, 24)
    got = fi.cg(simulated(A), simulated(b), damping="auto", tol=1e-2)
    assert got.iterations == want.iterations
    assert got.damping == pytest.approx(want.damping, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 9, 11])
def test_lanczos_stops_where_it_breaks_down(
    rank: int, simulated: Callable[[Tensor], Tensor]
) -> None:
    """The steps made past a breakdown, before the next look, are left out."""
    U = torch.linalg.qr(sides(rank).T)[0]
    A = U @ torch.diag(torch.linspace(1, 2, rank, dtype=torch.float64)) @ U.T
    want = spectrum(A, sides())
    assert tuple(spectrum(simulated(A), simulated(sides()))) == pytest.approx(tuple(want), abs=1e-9)
    assert want.largest == pytest.approx(2.0 if rank > 1 else 1.0, rel=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_bad_options(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: check_every must be at least 1, got 0"):
        SOLVERS[name](matrix(1, 2), sides(), check_every=0)
    with pytest.raises(ValueError, match="cuda_graph must be 'auto', True or False, got 'yes'"):
        SOLVERS[name](matrix(1, 2), sides(), cuda_graph="yes")
    with pytest.raises(ValueError, match="a Tensor on cpu cannot be recorded"):
        SOLVERS[name](matrix(1, 2), sides(), cuda_graph=True)
