"""Block conjugate gradients: right-hand sides that search together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastif_ext as fi

P = 60


def matrix(low: float = 1e-3, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(P, P, generator=g, dtype=torch.float64))[0]
    A = Q @ torch.diag(torch.logspace(0, 3, P, dtype=torch.float64) * low) @ Q.T
    return ((A + A.T) / 2).to(dtype)


def sides(R: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(R, P, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("R", [2, 8, P, P + 5])
def test_solves_with_fewer_products(R: int, dtype: torch.dtype) -> None:
    A, b = matrix(dtype=dtype), sides(R, dtype)
    tol = 1e-8 if dtype == torch.float64 else 1e-3
    together = fi.cg(A, b, tol=tol, block=True)
    alone = fi.cg(A, b, tol=tol, block=False)
    assert together.converged
    assert together.iterations <= alone.iterations
    if R >= 8:
        assert together.iterations <= alone.iterations / 2
    assert len(together.history) == together.iterations


def test_right_hand_sides_of_all_sizes_reach_the_tolerance() -> None:
    b = sides(6, torch.float32) * torch.logspace(-12, 12, 6)[:, None]
    result = fi.cg(matrix(dtype=torch.float32), b, damping=0.01, tol=1e-4)
    assert result.converged


def test_dependent_and_zero_right_hand_sides() -> None:
    A, b = matrix(), sides(6)
    b[1], b[2], b[3] = b[0], 0, b[0] - 2 * b[4]
    result = fi.cg(A, b, tol=1e-9)
    assert result.converged
    assert not result.x[2].any()
    torch.testing.assert_close(result.x, torch.linalg.solve(A, b.T).T, rtol=1e-6, atol=1e-6)


def test_all_zero() -> None:
    result = fi.cg(matrix(), torch.zeros(3, P, dtype=torch.float64))
    assert result.converged
    assert result.iterations == 0


def test_beyond_rounding_it_goes_on_one_by_one() -> None:
    A, b = matrix(dtype=torch.float32), sides(8, torch.float32)
    with pytest.warns(UserWarning, match="cg: residual"):
        result = fi.cg(A, b, tol=1e-12, max_iter=200)
    assert result.x.isfinite().all()
    assert float(result.residual.max()) < 1e-3


def test_indefinite() -> None:
    A = matrix()
    A -= 0.05 * torch.eye(P, dtype=torch.float64)
    with pytest.raises(fi.SolverDivergence, match="indefinite"):
        fi.cg(A, sides(4))


def test_options() -> None:
    with pytest.raises(ValueError, match="block must be"):
        fi.cg(matrix(), sides(2), block="yes")
