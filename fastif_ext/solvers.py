"""Solve (H + damping I) x = b for a symmetric operator: what all solvers share, and exact.

A solver knows nothing of models: H is anything with ``H @ v`` for v of shape [R, p]. Every solver
returns the true residual |b - (H + damping I) x| / |b| of each right-hand side.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastif_ext.device import full_precision, memory_for
from fastif_ext.spectrum import SolverDivergence, apply, resolve_damping

EXACT_LIMIT = 20_000  # a dense float64 matrix of this size takes 3.2 GB


@dataclass
class SolveResult:
    """The solution of (H + damping I) x = b and the evidence for it."""

    x: Tensor
    """[p] or [R, p], as b."""
    iterations: int
    """Products with H that the iteration took."""
    converged: bool
    """Whether every right-hand side's true residual is at most tol."""
    residual: Tensor
    """|b - (H + damping I) x| / |b|, float64, [] or [R]; 0 where b is 0."""
    damping: float
    """The damping of the system that was solved."""
    scale: float | None = None
    """LiSSA's scale; None for the other solvers."""
    history: list[float] = field(default_factory=list)
    """The largest relative residual over the right-hand sides, at each iteration."""


def right_hand_sides(b: Tensor) -> Tensor:
    """b as [R, p]; it must be finite and floating-point."""
    if not isinstance(b, Tensor) or b.dim() not in (1, 2) or not b.is_floating_point():
        got = list(b.shape) if isinstance(b, Tensor) else type(b).__name__
        raise ValueError(f"b must be a floating-point tensor [p] or [R, p], got {got}")
    if b.numel() == 0:
        raise ValueError(f"b is empty: it has shape {list(b.shape)}")
    if not b.isfinite().all():
        raise ValueError("b holds NaN or infinite values; check the gradient it came from")
    b = b.detach()
    return b if b.dim() == 2 else b[None]


def true_residual(H: Any, x: Tensor, b: Tensor, damping: float) -> Tensor:
    """|b - (H + damping I) x| / |b| for each row, float64; 0 where b is 0."""
    difference = b - apply(H, x) - damping * x
    norm = b.double().norm(dim=1)
    return torch.where(norm > 0, difference.double().norm(dim=1) / norm.clamp(min=1e-300), 0.0)


def finish(
    H: Any,
    x: Tensor,
    b: Tensor,
    *,
    one: bool,
    damping: float,
    tol: float,
    name: str,
    iterations: int,
    scale: float | None = None,
    history: list[float] | None = None,
    residual: Tensor | None = None,
) -> SolveResult:
    """Measure the true residual unless given, warn where it is above tol, wrap everything up."""
    if residual is None:
        residual = true_residual(H, x, b, damping)
    converged = bool((residual <= tol).all())
    if not converged:
        warnings.warn(
            f"{name}: residual {float(residual.max()):.2e} after {iterations} iterations, tol is "
            f"{tol:.2e}; raise max_iter or damping, or accept a larger tol "
            f"(float32 rarely gets below 1e-6 times the condition number)",
            stacklevel=3,
        )
    return SolveResult(
        x=x[0] if one else x,
        iterations=iterations,
        converged=converged,
        residual=residual[0] if one else residual,
        damping=damping,
        scale=scale,
        history=history or [],
    )


def exact(H: Any, b: Tensor, *, damping: float | str = 0.0, tol: float = 1e-5) -> SolveResult:
    """The dense solution of (H + damping I) x = b, for up to 20,000 parameters.

    H is formed by p products with unit vectors; the system may be indefinite but not singular.

    Args:
        H: symmetric operator.
        b: right-hand sides, [p] or [R, p].
        damping: a number, or "auto".
        tol: relative residual above which a warning is given.

    Returns:
        SolveResult; iterations is p.

    Raises:
        ValueError: p is too large, or the system is singular.

    Example:
        >>> import torch, fastif_ext as fi
        >>> fi.exact(torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([2.0, 4.0]), damping=1.0).x
        tensor([1., 1.])
    """
    check_tolerance("exact", tol, None)
    rhs = right_hand_sides(b)
    p = rhs.shape[1]
    if p > EXACT_LIMIT:
        raise ValueError(
            f"exact: p = {p} parameters need a dense matrix of {p * p * 8 / 1e9:.0f} GB; the limit "
            f"is {EXACT_LIMIT}. Use cg or lissa, or select fewer parameters with params="
        )
    with (
        full_precision(rhs.device),
        memory_for(
            f"a dense float64 matrix of {p} x {p} parameters ({p * p * 8 / 1e9:.1f} GB) and its "
            f"factors",
            "use cg or lissa, or select fewer parameters with params=",
        ),
    ):
        lam, _ = resolve_damping(H, rhs, damping)
        x = _dense_solution(H, rhs, lam)
        return finish(
            H,
            x.to(rhs.dtype),
            rhs,
            one=b.dim() == 1,
            damping=lam,
            tol=tol,
            name="exact",
            iterations=p,
        )


def _dense_solution(H: Any, b: Tensor, damping: float) -> Tensor:
    """The solution for b [R, p] by LU in float64."""
    p = b.shape[1]
    rows = []
    for start in range(0, p, 256):
        unit = torch.zeros(min(256, p - start), p, dtype=b.dtype, device=b.device)
        unit.diagonal(start).fill_(1)
        rows.append(apply(H, unit))
    A = torch.cat(rows).double()
    A = (A + A.T) / 2
    A.diagonal().add_(damping)
    if not A.isfinite().all():
        raise SolverDivergence("exact: H @ v is not finite; check the model, its loss and its data")
    lu, pivots, _ = torch.linalg.lu_factor_ex(A)
    size = lu.diagonal().abs()
    if size.min() <= p * torch.finfo(torch.float64).eps * size.max():
        raise ValueError(
            f"exact: H + damping I is singular with damping {damping:.3g}; use more damping"
        )
    return torch.linalg.lu_solve(lu, pivots, b.double().T).T


def check_tolerance(
    name: str, tol: float, max_iter: int | None, check_every: int | None = None
) -> None:
    """Require tol > 0, max_iter >= 1 and check_every >= 1."""
    if not tol > 0:
        raise ValueError(f"{name}: tol must be positive, got {tol}")
    if max_iter is not None and max_iter < 1:
        raise ValueError(f"{name}: max_iter must be at least 1, got {max_iter}")
    if check_every is not None and check_every < 1:
        raise ValueError(f"{name}: check_every must be at least 1, got {check_every}")
