"""Conjugate gradients: one by one, as a block, and preconditioned."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastif_ext.block_cg import block_conjugate_gradients
from fastif_ext.device import full_precision, look_every
from fastif_ext.graphs import CudaGraph, recorded
from fastif_ext.solvers import (
    SolveResult,
    check_tolerance,
    finish,
    right_hand_sides,
    true_residual,
)
from fastif_ext.spectrum import (
    Lanczos,
    SolverDivergence,
    apply,
    automatic_damping,
    check_definite,
    resolve_damping,
    single,
    spectrum,
)

GOAL = 0.9  # of tol, for the recursion's residual, which drifts from the true one


def cg(
    H: Any,
    b: Tensor,
    *,
    damping: float | str = 0.0,
    tol: float = 1e-5,
    max_iter: int | None = None,
    block: bool | str = "auto",
    preconditioner: Any = "auto",
    check_every: int | None = None,
    cuda_graph: CudaGraph = "auto",
    progress: bool = False,
) -> SolveResult:
    """Conjugate gradients for (H + damping I) x = b, all right-hand sides in one batch.

    As a block all right-hand sides search one space together, which takes fewer products: 8 in
    place of 17 for 8 test gradients of softmax regression on digits. One by one their solutions
    depend on no other right-hand side, and no step waits for the device.

    With damping="auto" and one right-hand side the Lanczos steps that look for damping, 16 to 30,
    mostly solve the system, too.

    On a subset of up to some thousand rows a few rows of the Gauss-Newton matrix's factor, each of
    which takes one backward pass through one example, make a preconditioner: 5 products in place of
    8 for 8 test gradients of a CNN on 100 rows of Fashion-MNIST, 8 in place of 15 for one (the
    system of bench/bench_lissa.py).

    Args:
        H: symmetric operator; H + damping I must be positive definite.
        b: right-hand sides, [p] or [R, p].
        damping: a number, or "auto" (from Lanczos steps; see lissa).
        tol: relative residual to reach.
        max_iter: at most this many products; by default 2 p + 20.
        block: True, False, or "auto": a block where there are several, up to p / 2, on the CPU.
        preconditioner: a symmetric positive definite operator near (H + damping I)^-1, with
            ``M @ v`` for v [R, p]; None; or "auto", what the curvature operators make of themselves
            where it pays (``H.preconditioner``).
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
    if isinstance(preconditioner, str) and preconditioner != "auto":
        raise ValueError(
            f"cg: preconditioner must be 'auto', None or an operator with M @ v, got "
            f"{preconditioner!r}"
        )
    if block not in ("auto", True, False):
        raise ValueError(f"cg: block must be 'auto', True or False, got {block!r}")
    rhs = right_hand_sides(b)
    whole = rhs.dtype in (torch.float32, torch.float64)  # halves have no QR decomposition
    fits = whole and rhs.device.type == "cpu" and 1 < len(rhs) <= rhs.shape[1] // 2
    together = fits if block == "auto" else bool(block)
    every = look_every(rhs.device) if check_every is None else check_every
    limit = 2 * rhs.shape[1] + 20 if max_iter is None else max_iter
    with full_precision(rhs.device), recorded(H, cuda_graph, rhs.device) as A:
        lam, x, history = _start(A, rhs, damping, 0 if together else limit)
        made = cache(lambda: _preconditioner(preconditioner, A, lam, len(rhs)))

        def one_by_one(share: float) -> tuple[Tensor, list[float]]:
            left = limit - len(history)
            return _conjugate_gradients(A, rhs, x, lam, made(), share * tol, left, every, progress)

        if together:
            x, history = block_conjugate_gradients(A, rhs, lam, GOAL * tol, limit, progress, made())
        goal = tol if together else GOAL * tol
        if not _reached(history, goal) and len(history) < limit:
            x, more = one_by_one(GOAL)  # what a block began and rounding ended, too
            history += more
        residual = true_residual(A, x, rhs, lam)
        if history and history[-1] <= tol < float(residual.max()) and len(history) < limit:
            x, more = one_by_one(0.5 * GOAL)  # the recursion's residual has drifted from the true
            history += more
            residual = true_residual(A, x, rhs, lam)
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
            residual=residual,
        )


def _start(
    H: Any, b: Tensor, damping: float | str, steps: int
) -> tuple[float, Tensor, list[float]]:
    """The damping, and where to begin: for a `damping` that takes Lanczos steps, what they solve.

    Of these at most `steps` are made use of, and have their residuals returned.
    """
    one = single(b) if damping == "auto" and steps > 0 else None
    if one is None:
        return resolve_damping(H, b, damping)[0], torch.zeros_like(b), []
    known = Lanczos(H, one)
    lam = automatic_damping(known.ends)
    x, history = known.solution(lam, steps)
    return lam, x[None], history


def _reached(history: list[float], goal: float) -> bool:
    return bool(history) and history[-1] <= goal


def _preconditioner(chosen: Any, H: Any, damping: float, right_hand_sides: int) -> Any:
    if not isinstance(chosen, str):
        return chosen
    make = getattr(H, "preconditioner", None)
    return None if make is None or damping <= 0 else make(damping, right_hand_sides)


def _conjugate_gradients(
    H: Any,
    b: Tensor,
    start: Tensor,
    damping: float,
    M: Any,
    goal: float,
    limit: int,
    every: int,
    progress: bool,
) -> tuple[Tensor, list[float]]:
    """The solution, and the largest relative residual of each step.

    A right-hand side that has converged is frozen by a step of length 0, on the device; nothing
    waits for the device but a look, every few steps.
    """
    norm = _norm(b)
    goals = goal * norm
    r = b - apply(H, start) - damping * start if start.any() else b.clone()
    x, d = start.clone(), r.clone() if M is None else apply(M, r)
    size = _norm(r)
    slope = size.square() if M is None else _dot(r, d)
    history: list[float] = []
    unread: list[tuple[Tensor, Tensor, Tensor]] = []
    done = not (size > goals).any()
    with tqdm(total=limit, desc="cg", disable=not progress) as bar:
        while not done:
            active = size > goals
            product = torch.add(apply(H, d), d, alpha=damping)
            curvature = _dot(d, product)
            alpha = torch.where(active, slope / curvature, 0.0).to(x.dtype)[:, None]
            x += alpha * d
            r -= alpha * product
            size = _norm(r)
            z = r if M is None else apply(M, r)
            new = size.square() if M is None else _dot(r, z)
            d = z + torch.where(active, new / slope, 0.0).to(x.dtype)[:, None] * d
            slope = new
            unread.append((active, curvature, size))
            if len(unread) < every and len(history) + len(unread) < limit:
                continue
            for residual, going, finite, least in _look(unread, norm, goals):
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


def _norm(rows: Tensor) -> Tensor:
    """|row|, float64 [R]."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """a . b of each row, float64 [R]."""
    return (a.double() * b.double()).sum(1)


def _look(
    steps: list[tuple[Tensor, Tensor, Tensor]], norm: Tensor, goals: Tensor
) -> list[list[float]]:
    """Of some steps, in one transfer: what they came to and whether they went well.

    The largest relative residual, whether any right-hand side is active still, whether all
    curvatures were finite, the least curvature of an active one.
    """
    active, curvature, size = (torch.stack(parts) for parts in zip(*steps, strict=True))
    residual = (size / norm.clamp(min=1e-300)).amax(1)
    going = (size > goals).any(1)
    finite = curvature.isfinite().all(1)
    least = curvature.masked_fill(~active, torch.inf).amin(1)
    return torch.stack([residual, going.double(), finite.double(), least], 1).tolist()
