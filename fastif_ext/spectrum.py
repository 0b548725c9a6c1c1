"""The ends of an operator's spectrum, and the damping that a system needs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastif_ext.device import full_precision, look_every

LANCZOS_STEPS = 30


class SolverDivergence(RuntimeError):  # noqa: N818  the name of the event, as in the field
    """A solver cannot converge on this system; the message says why and what helps."""


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
        >>> from fastif_ext.spectrum import spectrum
        >>> ends = spectrum(torch.diag(torch.tensor([-1.0, 0.0, 3.0])), torch.ones(3))
        >>> round(ends.smallest, 4), round(ends.largest, 4)
        (-1.0, 3.0)
    """
    with full_precision(like.device):
        alpha, beta = _lanczos(H, like, min(steps, like.shape[-1]))
    if not all(map(math.isfinite, alpha + beta)):
        raise SolverDivergence("H @ v is not finite; check the model, its loss and its data")
    off = torch.tensor(beta[: len(alpha) - 1], dtype=torch.float64)
    T = torch.diag(torch.tensor(alpha, dtype=torch.float64)) + off.diag(1) + off.diag(-1)
    values, vectors = torch.linalg.eigh(T)
    bound = beta[-1] * abs(float(vectors[-1, -1]))
    return Spectrum(float(values[0]), float(values[-1]) + bound)


def _lanczos(H: Any, like: Tensor, steps: int) -> tuple[list[float], list[float]]:
    """The diagonal alpha and, one below it, beta of the tridiagonal matrix, up to a breakdown."""
    p, every = like.shape[-1], look_every(like.device)
    generator = torch.Generator().manual_seed(0)
    basis = torch.empty(steps + 1, p, dtype=like.dtype, device=like.device)
    basis[0] = torch.randn(p, generator=generator, dtype=torch.float64).to(like.dtype)
    basis[0] /= basis[0].norm()
    figures: list[Tensor] = []  # on the device, until they are looked at
    found: list[list[float]] = []
    top = 0.0
    for k in range(steps):
        w = apply(H, basis[k][None])[0]
        alpha = basis[k] @ w
        known = basis[: k + 1]
        for _ in range(2):
            w = w - known.T @ (known @ w)
        beta = w.norm()
        torch.div(w, beta, out=basis[k + 1])
        figures.append(torch.stack([alpha, beta]))
        if len(figures) < every and k + 1 < steps:
            continue
        for row in torch.stack(figures).tolist():
            found.append(row)
            top = max(top, abs(row[0]))
            if not row[1] > 1e-7 * top:
                return _columns(found)
        figures = []
    return _columns(found)


def _columns(rows: list[list[float]]) -> tuple[list[float], list[float]]:
    return [row[0] for row in rows], [row[1] for row in rows]


def automatic_damping(ends: Spectrum) -> float:
    """What damping="auto" takes: 1 % of the largest eigenvalue, and twice any negative one.

    H + damping I is then positive definite with a condition number of about 100 at most.
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


def apply(H: Any, v: Tensor) -> Tensor:
    """H v for v [R, p]; a plain matrix acts from the left on each row."""
    return v @ H.T if isinstance(H, Tensor) else H @ v
