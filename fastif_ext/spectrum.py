"""The ends of an operator's spectrum, and the damping that a system needs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

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


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
