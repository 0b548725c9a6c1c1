"""Block conjugate gradients: all right-hand sides search one space together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.linalg import cholesky_ex, eigvalsh, qr
from tqdm.auto import tqdm

from fastif_ext.spectrum import SolverDivergence, apply, check_definite, spectrum

NEGATIVE = 1e-5  # of the largest curvature: less than that below zero may be rounding


def block_conjugate_gradients(
    H: Any,
    b: Tensor,
    damping: float,
    goal: float,
    limit: int,
    progress: bool,
    M: Any = None,
) -> tuple[Tensor, list[float]]:
    """The solution X of (H + damping I) X = B, and the largest relative residual of each step.

    Every step takes the best X in the space of all directions so far, of all R right-hand sides, so
    that R of them take a half to a third of the steps that each would take alone. The residuals
    are kept as Q zeta with orthonormal Q (BCGrQ: Dubrulle 2001), which makes equal, dependent and
    converged right-hand sides harmless.

    Args:
        H: symmetric operator.
        b: [R, p].
        damping: added to its diagonal.
        goal: relative residual to reach, for each right-hand side.
        limit: at most this many products.
        progress: show a progress bar.
        M: preconditioner, symmetric positive definite, with ``M @ v``; None for the identity.

    Returns:
        x, [R, p], which falls short of the goal where `limit` or rounding ends the steps.

    Raises:
        SolverDivergence: negative curvature, or products that are not finite.
    """
    norm = b.norm(dim=1, keepdim=True)
    inverse = torch.where(norm > 0, 1 / norm.clamp(min=torch.finfo(b.dtype).tiny), 0.0)
    x = torch.zeros_like(b)
    history: list[float] = []
    if not norm.any():
        return x, history
    # small right-hand sides as accurate as large ones
    q, zeta = _orthonormal(b * inverse)
    s, rho = _preconditioned(q, M)
    reached = b.any(0)
    with tqdm(total=limit, desc="cg", disable=not progress) as bar:
        while len(history) < limit:
            product = apply(H, s)
            reached |= product.any(0)
            product = torch.add(product, s, alpha=damping)
            curvature = s @ product.T
            factor, failed = cholesky_ex(_symmetric(curvature))
            if failed:
                _explain(H, b, damping, curvature)
                break
            step = torch.cholesky_solve(rho, factor)
            x.addmm_((step @ zeta).T, s)
            q, change = _orthonormal(torch.addmm(q, step.T, product, alpha=-1))
            zeta = change @ zeta
            history.append(float(zeta.norm(dim=0).max()))
            bar.update()
            if history[-1] <= goal:
                break
            z, new = _preconditioned(q, M)
            s = torch.addmm(z, new @ change @ torch.linalg.inv(rho), s)
            rho = new
    # an orthonormal basis has rounding errors where all it is made of is zero: dead features
    return x * norm * reached, history


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, r) with Q^T r = rows^T, the rows of Q orthonormal even where those given depend."""
    q, r = qr(rows.T)
    return q.T.contiguous(), r


def _preconditioned(q: Tensor, M: Any) -> tuple[Tensor, Tensor]:
    """M Q and Q M Q^T, as well conditioned as M."""
    if M is None:
        return q, torch.eye(len(q), dtype=q.dtype, device=q.device)
    z = apply(M, q)
    return z, _symmetric(q @ z.T)


def _symmetric(a: Tensor) -> Tensor:
    return (a + a.T) / 2


def _explain(H: Any, b: Tensor, damping: float, curvature: Tensor) -> None:
    """Raise where it was not by rounding that the curvature in the space is not positive."""
    if not curvature.isfinite().all():
        raise SolverDivergence("cg: H @ v is not finite; check the model and its loss")
    values = eigvalsh(_symmetric(curvature.double()))
    if float(values[0]) <= -NEGATIVE * float(values.abs().max()):
        check_definite(spectrum(H, b), damping)
        raise SolverDivergence(
            f"cg: a direction of curvature {float(values[0]):.2e} turned up with damping "
            f"{damping:.3g}; use damping > 0 or 'auto'"
        )
