"""The ends of an operator's spectrum, and the damping that a system needs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastif_ext.device import full_precision, look_every

LANCZOS_STEPS = 30
LOOKS = 16, 20, 24  # steps after which to see whether more are needed


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
        _, columns = _lanczos(H, _random(like), min(steps, like.shape[-1]), settle=False)
    return _ends(columns)


class Lanczos:
    """Lanczos steps from a right-hand side on, until automatic damping is settled.

    A gradient lies where curvature is, so that steps from there find both ends of the spectrum
    sooner than from a random vector, which is mostly null space: for a CNN with an eigenvalue of
    -1.10 below a top of 55.8, 16 steps see -1.06 and 10 already -0.90; from a random vector -0.94
    and -0.59. Besides, they solve any shifted system with that right-hand side.

    Where their space ends early, because the right-hand side lies among a few eigenvectors, steps
    from a random vector look for the others.

    Args:
        H: symmetric operator with ``H @ v`` for v [1, p].
        b: the right-hand side, [p], not zero.

    Attributes:
        ends: the Spectrum that was seen.
    """

    def __init__(self, H: Any, b: Tensor) -> None:
        steps = min(LANCZOS_STEPS, len(b))
        self._norm = torch.linalg.vector_norm(b, dtype=torch.float64)
        with full_precision(b.device):
            self._basis, self._columns = _lanczos(H, b / self._norm, steps, settle=True)
        self.ends = _ends(self._columns)
        if len(self._columns) < len(b) and _exhausted(self._columns):
            self._basis = self._basis[: len(self._columns)].clone()
            others = spectrum(H, b)
            self.ends = Spectrum(
                min(self.ends.smallest, others.smallest), max(self.ends.largest, others.largest)
            )

    def solution(self, damping: float, steps: int) -> tuple[Tensor, list[float]]:
        """What solves (H + damping I) x = b best in the space of at most so many steps, [p].

        Also its relative residual after each step.
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


def _lanczos(H: Any, start: Tensor, steps: int, *, settle: bool) -> tuple[Tensor, _Columns]:
    """The basis and the matrix, up to a breakdown or, if so wished, until damping is settled."""
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
        if settle and len(found) in LOOKS and _settled(found):
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
    """Whether automatic damping is settled, to about 10 %, as far as these steps can tell.

    It would be no more than 10 % larger if the ends lay beyond what was seen of them by as much as
    their eigenvalues may be off. Twice a negative one is taken, which leaves room for more.
    """
    smallest, largest, low, high = _ritz(columns)
    seen = automatic_damping(Spectrum(smallest, largest))
    return automatic_damping(Spectrum(smallest - low, largest + high)) <= 1.1 * seen


def automatic_damping(ends: Spectrum) -> float:
    """What damping="auto" takes: 1 % of the largest eigenvalue, and twice any negative one.

    H + damping I is then positive definite with a condition number of about 100 at most.
    """
    return max(0.01 * ends.largest, -2.0 * ends.smallest, 1e-12)


def single(b: Tensor) -> Tensor | None:
    """The right-hand side [p], where there is one, and it is not zero."""
    return b.flatten() if b.numel() == b.shape[-1] and bool(b.any()) else None


def resolve_damping(H: Any, b: Tensor, damping: float | str) -> tuple[float, Spectrum | None]:
    """A number for `damping`, and the spectrum if it had to be looked at.

    For one right-hand side by steps from there, as cg makes them; for several by steps that do not
    depend on them.
    """
    if damping == "auto":
        one = single(b)
        ends = spectrum(H, b) if one is None else Lanczos(H, one).ends
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
