"""The ends of an operator's spectrum, and the damping that a system needs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastif_ext.device import full_precision, look_every

LANCZOS_STEPS = 30
LOOKS = 16, 20, 24, LANCZOS_STEPS  # steps after which to see whether more are needed


class SolverDivergence(RuntimeError):  # noqa: N818  the name of the event, as in the field
    """A solver cannot converge on this system; the message says why and what helps."""


class Spectrum(NamedTuple):
    """Lanczos estimates of the ends of a symmetric operator's spectrum."""

    smallest: float
    """An upper bound of the smallest eigenvalue, close to it."""
    largest: float
    """An estimate of the largest eigenvalue, its residual bound added."""


def spectrum(H: Any, like: Tensor, *, steps: int = LANCZOS_STEPS) -> Spectrum:
    """The ends of H's spectrum from Lanczos steps with full reorthogonalisation.

    Args:
        H: symmetric operator with ``H @ v`` for v [1, p].
        like: right-hand sides [..., p] of H's dtype and device. The steps begin at their sum, or at
            a random vector where that is zero, and end early once automatic damping is settled.
        steps: products with H at most.

    Returns:
        Spectrum(smallest, largest).

    Example:
        >>> import torch
        >>> from fastif_ext.spectrum import spectrum
        >>> ends = spectrum(torch.diag(torch.tensor([-1.0, 0.0, 3.0])), torch.ones(3))
        >>> round(ends.smallest, 4), round(ends.largest, 4)
        (-1.0, 3.0)
    """
    return Lanczos(H, like, steps=steps).ends


class Lanczos:
    """Lanczos steps from the right-hand sides on: the ends of the spectrum, and what they solve.

    Gradients lie where curvature is, so that steps from there find both ends sooner than from a
    random vector, which is mostly null space: for a CNN with an eigenvalue of -1.10 below a top of
    55.8, 16 steps see -1.06 and 10 already -0.90; from a random vector -0.94 and -0.59. Besides,
    they solve any shifted system with that right-hand side.

    Where the space of such steps ends early, because the right-hand side lies among a few
    eigenvectors, steps from a random vector look for the others.
    """

    def __init__(self, H: Any, like: Tensor, *, steps: int = LANCZOS_STEPS) -> None:
        p = like.shape[-1]
        steps = min(steps, p)
        total = like.reshape(-1, p).sum(0)
        self._norm = torch.linalg.vector_norm(total, dtype=torch.float64)
        start = torch.where(self._norm > 0, total / self._norm, _random(like)).to(like.dtype)
        with full_precision(like.device):
            self._basis, self._columns = _lanczos(H, start, steps)
            self.ends = _ends(self._columns)
            if len(self._columns) < p and _exhausted(self._columns):
                others = _ends(_lanczos(H, _random(like), steps)[1])
                self.ends = _union(self.ends, others)

    def solution(self, damping: float, steps: int) -> tuple[Tensor, list[float]]:
        """What solves (H + damping I) x = b best in the space of at most so many steps, [p].

        b is the sum of the right-hand sides, which must not be zero. Also its relative residual
        after each step.
        """
        T = _tridiagonal(self._columns[:steps])
        T.diagonal().add_(damping)
        residuals = []
        for k in range(1, len(T) + 1):
            y = torch.linalg.solve(T[:k, :k], torch.eye(k, 1, dtype=T.dtype))[:, 0]
            residuals.append(abs(float(y[-1])) * self._columns[k - 1][1])
        y = (float(self._norm) * y).to(self._basis)
        return y @ self._basis[: len(y)], residuals


_Columns = list[list[float]]
"""The diagonal alpha and, below it, beta of the tridiagonal matrix, column by column."""


def _lanczos(H: Any, start: Tensor, steps: int) -> tuple[Tensor, _Columns]:
    """The basis and the matrix, up to a breakdown or until automatic damping is settled."""
    looks_are_free = look_every(start.device) == 1
    basis = start.new_empty(steps + 1, len(start))
    basis[0] = start
    figures: list[Tensor] = []  # on the device, until they are looked at
    found: _Columns = []
    for k in range(steps):
        w = apply(H, basis[k][None])[0]
        alpha = basis[k] @ w
        known = basis[: k + 1]
        for _ in range(2):
            w = w - known.T @ (known @ w)
        beta = w.norm()
        torch.div(w, beta, out=basis[k + 1])
        figures.append(torch.stack([alpha, beta]))
        if not looks_are_free and k + 1 not in LOOKS and k + 1 < steps:
            continue
        for row in torch.stack(figures).tolist():
            if not all(map(math.isfinite, row)):
                raise SolverDivergence(
                    "H @ v is not finite; check the model, its loss and its data"
                )
            found.append(row)
            if _exhausted(found):
                return basis, found
        figures = []
        if len(found) in LOOKS and _settled(found):
            break
    return basis, found


def _exhausted(columns: _Columns) -> bool:
    """Whether there is no direction left to go on in."""
    return not columns[-1][1] > 1e-7 * max(abs(alpha) for alpha, _ in columns)


def _random(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(like.shape[-1], generator=generator, dtype=torch.float64).to(like)
    return start / start.norm()


def _tridiagonal(columns: _Columns) -> Tensor:
    alpha, beta = torch.tensor(columns, dtype=torch.float64).T
    return torch.diag(alpha) + torch.diag(beta[:-1], 1) + torch.diag(beta[:-1], -1)


def _ritz(columns: _Columns) -> tuple[float, float, float, float]:
    """The smallest and the largest eigenvalue of the matrix, and how near to each H has one."""
    values, vectors = torch.linalg.eigh(_tridiagonal(columns))
    near = columns[-1][1] * vectors[-1].abs()
    return float(values[0]), float(values[-1]), float(near[0]), float(near[-1])


def _ends(columns: _Columns) -> Spectrum:
    smallest, largest, _, near = _ritz(columns)
    return Spectrum(smallest, largest + near)


def _settled(columns: _Columns) -> bool:
    """Whether damping would be at most 10 % larger if the ends lay beyond what was seen of them.

    By as much, that is, as their eigenvalues may be off. Twice a negative one is taken, so that
    H + damping I is definite then, too.
    """
    smallest, largest, low, high = _ritz(columns)
    seen = automatic_damping(Spectrum(smallest, largest))
    return automatic_damping(Spectrum(smallest - low, largest + high)) <= 1.1 * seen


def _union(a: Spectrum, b: Spectrum) -> Spectrum:
    return Spectrum(min(a.smallest, b.smallest), max(a.largest, b.largest))


def automatic_damping(ends: Spectrum) -> float:
    """What damping="auto" takes: 1 % of the largest eigenvalue, and twice any negative one.

    H + damping I is then positive definite with a condition number of about 100 at most.
    """
    return max(0.01 * ends.largest, -2.0 * ends.smallest, 1e-12)


def resolve_damping(H: Any, b: Tensor, damping: float | str) -> tuple[float, Spectrum | None]:
    """A number for `damping`, and the spectrum if it had to be looked at."""
    if damping == "auto":
        ends = spectrum(H, b)
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
