"""Solve (H + damping I) x = b for a symmetric operator: what all solvers share, cg and exact.

A solver knows nothing of models: H is anything with ``H @ v`` for v of shape [R, p]. Every solver
returns the true residual |b - (H + damping I) x| / |b| of each right-hand side.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastif_ext.block_cg import block_conjugate_gradients
from fastif_ext.device import full_precision, look_every, memory_for
from fastif_ext.graphs import CudaGraph, recorded
from fastif_ext.spectrum import (
    SolverDivergence,
    apply,
    check_definite,
    resolve_damping,
    spectrum,
)

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
) -> SolveResult:
    """Measure the true residual, warn where it is above tol, and wrap everything up."""
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


def cg(
    H: Any,
    b: Tensor,
    *,
    damping: float | str = 0.0,
    tol: float = 1e-5,
    max_iter: int | None = None,
    block: bool | str = "auto",
    check_every: int | None = None,
    cuda_graph: CudaGraph = "auto",
    progress: bool = False,
) -> SolveResult:
    """Conjugate gradients for (H + damping I) x = b, all right-hand sides in one batch.

    As a block all right-hand sides search one space together, which takes fewer products: 7 in
    place of 19 for 8 test gradients of softmax regression on digits. One by one their solutions
    depend on no other right-hand side, and no step waits for the device.

    Args:
        H: symmetric operator; H + damping I must be positive definite.
        b: right-hand sides, [p] or [R, p].
        damping: a number, or "auto" (from a few Lanczos steps).
        tol: relative residual to reach.
        max_iter: at most this many products; by default 2 p + 20.
        block: True, False, or "auto": a block where there are several, up to p / 2, on the CPU.
        check_every: steps between two looks at the residual, as in lissa; the steps made beyond
            convergence change nothing and are not counted. A block looks at every step.
        cuda_graph: "auto", True or False, as in lissa.
        progress: show a progress bar.

    Returns:
        SolveResult.

    Raises:
        SolverDivergence: a direction of negative curvature turned up.
        ValueError: arguments that do not fit.

    Source: Hestenes and Stiefel 1952.

    Example:
        >>> import torch, fastif_ext as fi
        >>> H = torch.diag(torch.tensor([1.0, 4.0]))
        >>> fi.cg(H, torch.tensor([1.0, 4.0])).x.round(decimals=4)
        tensor([1., 1.])
    """
    check_tolerance("cg", tol, max_iter, check_every)
    if block not in ("auto", True, False):
        raise ValueError(f"cg: block must be 'auto', True or False, got {block!r}")
    rhs = right_hand_sides(b)
    fits = rhs.device.type == "cpu" and 1 < len(rhs) <= rhs.shape[1] // 2
    together = fits if block == "auto" else bool(block)
    with full_precision(rhs.device), recorded(H, cuda_graph, rhs.device) as A:
        lam, _ = resolve_damping(A, rhs, damping)
        limit = 2 * rhs.shape[1] + 20 if max_iter is None else max_iter
        every = look_every(rhs.device) if check_every is None else check_every
        x = torch.zeros_like(rhs)
        history: list[float] = []
        if together:
            goal = (0.9 if rhs.dtype == torch.float64 else 0.5) * tol
            x, history = block_conjugate_gradients(A, rhs, lam, goal, limit, progress)
        left = limit - len(history)
        if not together or (history and history[-1] > tol and left):  # ended by rounding
            x, more = _conjugate_gradients(A, rhs, x, lam, tol, left, every, progress)
            history += more
        return finish(
            A,
            x,
            rhs,
            one=b.dim() == 1,
            damping=lam,
            tol=tol,
            name="cg",
            iterations=len(history),
            history=history,
        )


def _conjugate_gradients(
    H: Any,
    b: Tensor,
    start: Tensor,
    damping: float,
    tol: float,
    limit: int,
    every: int,
    progress: bool,
) -> tuple[Tensor, list[float]]:
    """The solution, and the largest relative residual of each step.

    A right-hand side that has converged is frozen by a step of length 0, on the device; nothing
    waits for the device but a look, every few steps.
    """
    norm = b.double().norm(dim=1)
    # The recursion's residual drifts from the true one: aim a little below tol.
    goal = 0.5 * tol * norm
    x = start.clone()
    r = b - apply(H, x) - damping * x if start.any() else b.clone()
    d = r.clone()
    rs = r.double().square().sum(1)
    history: list[float] = []
    unread: list[tuple[Tensor, Tensor, Tensor]] = []
    done = not (rs.sqrt() > goal).any()
    with tqdm(total=limit, desc="cg", disable=not progress) as bar:
        while not done:
            active = rs.sqrt() > goal
            product = apply(H, d) + damping * d
            curvature = (d.double() * product.double()).sum(1)
            alpha = torch.where(active, rs / curvature, 0.0).to(x.dtype)[:, None]
            x += alpha * d
            r -= alpha * product
            new = r.double().square().sum(1)
            d = r + torch.where(active, new / rs, 0.0).to(x.dtype)[:, None] * d
            rs = new
            unread.append((active, curvature, rs))
            if len(unread) < every and len(history) + len(unread) < limit:
                continue
            for residual, going, finite, least in _look(unread, norm, goal):
                if not finite:
                    raise SolverDivergence("cg: H @ v is not finite; check the model and its loss")
                if least <= 0:
                    check_definite(spectrum(H, b), damping)
                    raise SolverDivergence(
                        f"cg: a direction of curvature {least:.2e} turned up with damping "
                        f"{damping:.3g}; use damping > 0 or 'auto'"
                    )
                history.append(residual)
                bar.update()
                done = not going or len(history) == limit
                if done:
                    break
            unread = []
    return x, history


def _look(
    steps: list[tuple[Tensor, Tensor, Tensor]], norm: Tensor, goal: Tensor
) -> list[list[float]]:
    """Of some steps, in one transfer: what they came to and whether they went well.

    The largest relative residual, whether any right-hand side is active still, whether all
    curvatures were finite, the least curvature of an active one.
    """
    active, curvature, rs = (torch.stack(parts) for parts in zip(*steps, strict=True))
    residual = (rs.sqrt() / norm.clamp(min=1e-300)).amax(1)
    going = (rs.sqrt() > goal).any(1)
    finite = curvature.isfinite().all(1)
    least = curvature.masked_fill(~active, torch.inf).amin(1)
    return torch.stack([residual, going.double(), finite.double(), least], 1).tolist()


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
