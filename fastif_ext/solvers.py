"""Solve (H + damping I) x = b for a symmetric operator: what all solvers share, cg and exact.

A solver knows nothing of models: H is anything with ``H @ v`` for v of shape [R, p]. Every solver
returns the true residual |b - (H + damping I) x| / |b| of each right-hand side.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

EXACT_LIMIT = 20_000  # a dense float64 matrix of this size takes 3.2 GB
LANCZOS_STEPS = 30


class SolverDivergence(RuntimeError):  # noqa: N818  its name says it all
    """A solver cannot converge on this system; the message says why and what helps."""


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


class Spectrum(NamedTuple):
    """Lanczos estimates of the ends of a symmetric operator's spectrum."""

    smallest: float
    """An upper bound of the smallest eigenvalue, close to it."""
    largest: float
    """An estimate of the largest eigenvalue, its residual bound added."""


def spectrum(H: Any, like: Tensor, *, steps: int = LANCZOS_STEPS) -> Spectrum:
    """The ends of H's spectrum from a few Lanczos steps with full reorthogonalisation.

    Args:
        H: symmetric operator with ``H @ v`` for v [1, p].
        like: a tensor [..., p] of H's dtype and device.
        steps: products with H.

    Returns:
        Spectrum(smallest, largest).

    Example:
        >>> import torch
        >>> from fastif_ext.solvers import spectrum
        >>> ends = spectrum(torch.diag(torch.tensor([-1.0, 0.0, 3.0])), torch.ones(3))
        >>> round(ends.smallest, 4), round(ends.largest, 4)
        (-1.0, 3.0)
    """
    p = like.shape[-1]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(p, generator=generator, dtype=torch.float64).to(like.device, like.dtype)
    q /= q.norm()
    basis, alpha, beta = [q], [], []
    for _ in range(min(steps, p)):
        w = apply(H, basis[-1][None])[0]
        alpha.append(float(basis[-1] @ w))
        for _ in range(2):
            stack = torch.stack(basis)
            w = w - stack.T @ (stack @ w)
        beta.append(float(w.norm()))
        if not beta[-1] > 1e-7 * max(map(abs, alpha)):
            break
        basis.append(w / beta[-1])
    if not all(map(_finite, alpha + beta)):
        raise SolverDivergence("H @ v is not finite; check the model, its loss and its data")
    off = torch.tensor(beta[: len(alpha) - 1], dtype=torch.float64)
    T = torch.diag(torch.tensor(alpha, dtype=torch.float64)) + off.diag(1) + off.diag(-1)
    values, vectors = torch.linalg.eigh(T)
    bound = beta[-1] * abs(float(vectors[-1, -1])) if len(beta) == len(alpha) else 0.0
    return Spectrum(float(values[0]), float(values[-1]) + bound)


def automatic_damping(ends: Spectrum) -> float:
    """The damping that "auto" stands for: 1 % of the largest eigenvalue, twice any negative one.

    H + damping I is then positive definite with a condition number of about 200 at most.
    """
    return max(0.01 * ends.largest, -2.0 * ends.smallest, 1e-12)


def resolve_damping(H: Any, like: Tensor, damping: float | str) -> tuple[float, Spectrum | None]:
    """A number for `damping`, and the spectrum if it had to be looked at."""
    if damping == "auto":
        ends = spectrum(H, like)
        return automatic_damping(ends), ends
    if isinstance(damping, str):
        raise ValueError(f"damping must be a number or 'auto', got {damping!r}")
    if not damping >= 0:
        raise ValueError(f"damping must not be negative, got {damping}")
    return float(damping), None


def check_definite(ends: Spectrum, damping: float) -> None:
    """Refuse a system whose negative curvature the damping does not lift."""
    if ends.smallest + damping <= -1e-9 * max(abs(ends.largest), 1e-30):
        raise SolverDivergence(
            f"H + damping I is indefinite: H has an eigenvalue of {ends.smallest:.3g} or below and "
            f"damping is {damping:.3g}. Use damping > {-ends.smallest:.3g} (damping='auto' takes "
            f"{automatic_damping(ends):.3g}), a larger or better subset (CurvatureSampler), or a "
            f"Gauss-Newton operator, which has no negative curvature"
        )


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
    progress: bool = False,
) -> SolveResult:
    """Conjugate gradients for (H + damping I) x = b, all right-hand sides in one batch.

    Args:
        H: symmetric operator; H + damping I must be positive definite.
        b: right-hand sides, [p] or [R, p].
        damping: a number, or "auto" (from a few Lanczos steps).
        tol: relative residual to reach.
        max_iter: at most this many products; by default 2 p + 20.
        progress: show a progress bar.

    Returns:
        SolveResult.

    Raises:
        SolverDivergence: a direction of negative curvature turned up.
        ValueError: arguments that do not fit.

    Source: Hestenes and Stiefel 1952.

    Example:
        >>> import torch, fastif_ext as fi
        >>> result = fi.cg(torch.diag(torch.tensor([1.0, 4.0])), torch.tensor([1.0, 4.0]))
        >>> result.x.round(decimals=4)
        tensor([1., 1.])
    """
    check_tolerance("cg", tol, max_iter)
    rhs = right_hand_sides(b)
    lam, _ = resolve_damping(H, rhs, damping)
    limit = 2 * rhs.shape[1] + 20 if max_iter is None else max_iter
    norm = rhs.double().norm(dim=1)
    x, r, d = torch.zeros_like(rhs), rhs.clone(), rhs.clone()
    rs = r.double().square().sum(1)
    history: list[float] = []
    iterations = 0
    # The recursion's residual drifts from the true one: aim a little below tol.
    with tqdm(total=limit, desc="cg", disable=not progress) as bar:
        while iterations < limit:
            active = rs.sqrt() > 0.5 * tol * norm
            if not active.any():
                break
            product = apply(H, d) + lam * d
            curvature = (d.double() * product.double()).sum(1)
            if not curvature.isfinite().all():
                raise SolverDivergence("cg: H @ v is not finite; check the model and its loss")
            if (curvature[active] <= 0).any():
                ends = spectrum(H, rhs)
                check_definite(ends, lam)
                raise SolverDivergence(
                    f"cg: a direction of curvature {float(curvature[active].min()):.2e} turned up "
                    f"with damping {lam:.3g}; use damping > 0 or 'auto'"
                )
            alpha = torch.where(active, rs / curvature, 0.0).to(x.dtype)[:, None]
            x += alpha * d
            r -= alpha * product
            new = r.double().square().sum(1)
            d = r + torch.where(active, new / rs, 0.0).to(x.dtype)[:, None] * d
            rs = new
            iterations += 1
            history.append(float((rs.sqrt() / norm.clamp(min=1e-300)).max()))
            bar.update()
    return finish(
        H,
        x,
        rhs,
        one=b.dim() == 1,
        damping=lam,
        tol=tol,
        name="cg",
        iterations=iterations,
        history=history,
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
    lam, _ = resolve_damping(H, rhs, damping)
    rows = []
    for start in range(0, p, 256):
        unit = torch.zeros(min(256, p - start), p, dtype=rhs.dtype, device=rhs.device)
        unit.diagonal(start).fill_(1)
        rows.append(apply(H, unit))
    A = torch.cat(rows).double()
    A = (A + A.T) / 2
    A.diagonal().add_(lam)
    if not A.isfinite().all():
        raise SolverDivergence("exact: H @ v is not finite; check the model, its loss and its data")
    lu, pivots, _ = torch.linalg.lu_factor_ex(A)
    size = lu.diagonal().abs()
    if size.min() <= p * torch.finfo(torch.float64).eps * size.max():
        raise ValueError(
            f"exact: H + damping I is singular with damping {lam:.3g}; use more damping"
        )
    x = torch.linalg.lu_solve(lu, pivots, rhs.double().T)
    return finish(
        H,
        x.T.to(rhs.dtype),
        rhs,
        one=b.dim() == 1,
        damping=lam,
        tol=tol,
        name="exact",
        iterations=p,
    )


def apply(H: Any, v: Tensor) -> Tensor:
    """H v for v [R, p]; a plain matrix acts from the left on each row."""
    return v @ H.T if isinstance(H, Tensor) else H @ v


def check_tolerance(name: str, tol: float, max_iter: int | None) -> None:
    """Require a positive tol and at least one iteration."""
    if not tol > 0:
        raise ValueError(f"{name}: tol must be positive, got {tol}")
    if max_iter is not None and max_iter < 1:
        raise ValueError(f"{name}: max_iter must be at least 1, got {max_iter}")


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
