"""LiSSA: the inverse-Hessian-vector product by a recursion of products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastif_ext import ops
from fastif_ext.chebyshev import Chebyshev
from fastif_ext.device import full_precision, look_every
from fastif_ext.graphs import CudaGraph, recorded
from fastif_ext.solvers import SolveResult, check_tolerance, finish, right_hand_sides
from fastif_ext.spectrum import (
    SolverDivergence,
    Spectrum,
    apply,
    check_definite,
    resolve_damping,
    spectrum,
)

RESTARTS, RESTART = 3, 4.0  # a run that diverges is made again at 4, 16, 64 times the scale
GROWTH = 1e3  # a residual this many times the smallest one seen, and above 1, is divergence


def lissa(
    H: Any,
    b: Tensor,
    *,
    damping: float | str = 0.0,
    scale: float | str = "auto",
    tol: float = 1e-5,
    max_iter: int = 1000,
    resample: Callable[[int], Any] | None = None,
    average: float | None = None,
    acceleration: str | None = "auto",
    check_every: int | None = None,
    cuda_graph: CudaGraph = "auto",
    progress: bool = False,
) -> SolveResult:
    """LiSSA for (H + damping I) x = b, all right-hand sides in one batch.

    The recursion (Agarwal, Bullins and Hazan 2017)

        I_0 = b,   I_{k+1} = b + (I - (H + damping I) / scale) I_k,   x = I / scale

    contracts while 0 < eig(H) + damping < 2 scale; `scale` sets the speed and never the answer.
    The update I_{k+1} - I_k is the residual b - (H + damping I) x_k itself, so the paper's stopping
    rule on the update norm and a tolerance on the true residual are one and the same, for free.

    On a fixed subset the steps are accelerated: I_{k+1} is replaced by w_k I_{k+1} + (1 - w_k)
    I_{k-1} with Chebyshev's weights for the spectrum (Golub and Varga 1961), which takes about the
    square root of the steps: 39 in place of 272 for 8 test gradients of softmax regression on
    400 digits, tol = 1e-3 (the system of bench/bench_lissa.py).

    Args:
        H: symmetric operator with ``H @ v`` (and, where it has it, ``H.products``) for v [R, p].
        b: right-hand sides, [p] or [R, p].
        damping: a number, or "auto": 1 % of H's largest eigenvalue, and at least twice its most
            negative one, by Lanczos: 30 products, or for one right-hand side 16 to 30 that begin
            there (and 30 more where these end early). 0 is a valid number for a definite H.
        scale: a number, or "auto": the midpoint of the spectrum of H + damping I, the fastest; with
            `resample` its upper end, which lets less of the sampling noise through.
        tol: relative residual |b - (H + damping I) x| / |b| to reach.
        max_iter: at most this many products.
        resample: called with the step k = 0, 1, ...; gives the operator of that step, a fresh
            subset. Then all `max_iter` steps are taken and the tail is averaged; damping and scale
            "auto" and the reported residual refer to H.
        average: share of the last steps whose iterates are averaged, in (0, 1]; by default .5 with
            `resample`, and no averaging without.
        acceleration: "chebyshev", None for the plain recursion, or "auto": "chebyshev" where scale
            is "auto", so that the spectrum is known, and there is neither `resample` nor `average`:
            what remembers the last step keeps the noise of fresh subsets.
        check_every: steps between two looks at the residual, each of which makes the host wait for
            the device: by default 1 on the CPU and 8 elsewhere. Up to check_every - 1 steps more
            are taken than are needed; `history` has every step.
        cuda_graph: whether products on a CUDA device are recorded and played (see
            fastif_ext.graphs): "auto", True (an error where they cannot be) or False. The products
            of `resample` are not.
        progress: show a progress bar.

    Returns:
        SolveResult; its residual is the true one, from a product of its own.

    Raises:
        SolverDivergence: negative curvature that the damping does not lift, or a residual that
            grows even at 64 times the scale; the message names the remedy.
        ValueError: arguments that do not fit.

    Example:
        >>> import torch, fastif_ext as fi
        >>> H = torch.diag(torch.tensor([1.0, 4.0]))
        >>> result = fi.lissa(H, torch.tensor([1.0, 4.0]), tol=1e-6)
        >>> result.converged, result.x.round(decimals=4)
        (True, tensor([1., 1.]))
    """
    check_tolerance("lissa", tol, max_iter, check_every)
    if average is not None and not 0 < average <= 1:
        raise ValueError(f"lissa: average must be between 0 and 1, got {average}")
    if not (scale == "auto" if isinstance(scale, str) else scale > 0):
        raise ValueError(f"lissa: scale must be positive or 'auto', got {scale!r}")
    if acceleration not in ("auto", "chebyshev", None):
        raise ValueError(
            f"lissa: acceleration must be 'auto', 'chebyshev' or None, got {acceleration!r}"
        )
    if average is None and resample is not None:
        average = 0.5
    if acceleration == "chebyshev" and average is not None:
        raise ValueError(
            "lissa: acceleration='chebyshev' needs a fixed subset and its last iterate; leave out "
            "resample and average, or take acceleration=None"
        )
    accelerated = acceleration == "chebyshev" or (
        acceleration == "auto" and scale == "auto" and average is None
    )
    rhs = right_hand_sides(b)
    every = look_every(rhs.device) if check_every is None else check_every
    with full_precision(rhs.device), recorded(H, cuda_graph, rhs.device) as A:
        lam, ends = resolve_damping(A, rhs, damping)
        run = _Recursion(A, rhs, lam, tol, max_iter, resample, average, every, progress)
        (iterate, iterations, history), s = _at_a_fitting_scale(run, scale, ends, accelerated)
        return finish(
            A,
            iterate / s,
            rhs,
            one=b.dim() == 1,
            damping=lam,
            tol=tol,
            name="lissa",
            iterations=iterations,
            scale=s,
            history=history,
        )


def _at_a_fitting_scale(
    run: _Recursion, scale: float | str, ends: Spectrum | None, accelerated: bool
) -> tuple[_Outcome, float]:
    """What the run gives, and the scale; larger ones are tried where it diverges."""
    H, b, lam, noisy = run.H, run.b, run.damping, run.resample is not None
    lowest = None
    if isinstance(scale, str) or accelerated:
        ends = ends or spectrum(H, b)
        check_definite(ends, lam)
        lowest = _lowest(ends, lam) if accelerated else None
        s = _scale(ends, lam, noisy=noisy)
    if not isinstance(scale, str):
        s = float(scale)
    outcome, restarts = run(s, lowest), 0
    if outcome is None:  # too small a scale, or negative curvature that Lanczos did not see
        ends = spectrum(H, b)
        check_definite(ends, lam)
        s = max(s, _scale(ends, lam, noisy=noisy) / RESTART)
    while outcome is None and restarts < RESTARTS:
        s, restarts = RESTART * s, restarts + 1
        outcome = run(s, lowest)
    if outcome is None:
        raise SolverDivergence(
            f"lissa: the residual grows even at scale {s:.3g} with damping {lam:.3g}; H has "
            f"negative curvature below -damping, or its products are not reproducible. Use more "
            f"damping (damping='auto'), a larger or better subset, or a Gauss-Newton operator"
        )
    return outcome, s


_Outcome = tuple[Tensor, int, list[float]]
"""The last iterate (or the mean of the tail), the steps, the residuals."""


class _Recursion:
    """One run of the recursion at a given scale."""

    def __init__(
        self,
        H: Any,
        b: Tensor,
        damping: float,
        tol: float,
        max_iter: int,
        resample: Callable[[int], Any] | None,
        average: float | None,
        every: int,
        progress: bool,
    ) -> None:
        self.every = every
        self.H, self.b, self.damping, self.tol = H, b.contiguous(), damping, tol
        self.max_iter, self.resample, self.progress = max_iter, resample, progress
        self.tail = max_iter if average is None else max_iter - max(1, round(average * max_iter))
        norm = b.double().norm(dim=1)
        self.inverse_norm = torch.where(norm > 0, 1 / norm.clamp(min=1e-300), 0.0).tolist()

    def __call__(self, scale: float, lowest: float | None) -> _Outcome | None:
        """The outcome; None where it diverges. Nothing waits for the device but a look.

        `lowest`: where the spectrum of H + damping I begins, if the steps are to be accelerated.
        """
        h = self.b.clone()
        chebyshev = None if lowest is None else Chebyshev(lowest, scale, h)
        history: list[float] = []
        unread: list[ops.LissaStep] = []
        smallest, tail_sum, tail_count = float("inf"), None, 0
        for k in tqdm(range(self.max_iter), desc="lissa", disable=not self.progress):
            operator = self.H if self.resample is None else self.resample(k)
            if chebyshev is not None:
                chebyshev.remember(h)
            unread.append(
                ops.lissa_update_(
                    h, self.b, _products(operator, h), damping=self.damping, scale=scale
                )
            )
            if chebyshev is not None:
                chebyshev.accelerate_(h)
            if k >= self.tail:
                tail_sum = h.clone() if tail_sum is None else tail_sum.add_(h)
                tail_count += 1
            if len(unread) < self.every and k + 1 < self.max_iter:
                continue
            for residual in self._read(unread):
                history.append(residual)
                smallest = min(smallest, residual)
                if not residual <= GROWTH * max(smallest, 1e-3):  # or not finite
                    return None
            unread = []
            # The update was made with the residual of the iterate before it. A plain step from
            # there is better still; an accelerated one need not be.
            if k < self.tail and self.resample is None and history[-1] <= self.tol:
                h = h if chebyshev is None else chebyshev.now
                break
        return (h if tail_sum is None else tail_sum / tail_count), len(history), history

    def _read(self, steps: list[ops.LissaStep]) -> list[float]:
        """The largest relative residual of some steps, in one transfer; NaN where h is not finite.

        What is not finite in h is so in the change of h.
        """
        found = []
        for row in torch.stack([step.delta_sq for step in steps]).tolist():
            sound = all(map(math.isfinite, row))
            residuals = (math.sqrt(d) * w for d, w in zip(row, self.inverse_norm, strict=True))
            found.append(max(residuals) if sound else math.nan)
        return found


def _products(operator: Any, h: Tensor) -> list[Tensor]:
    return operator.products(h) if hasattr(operator, "products") else [apply(operator, h)]


def _scale(ends: Spectrum, damping: float, *, noisy: bool) -> float:
    """The midpoint of the spectrum, where the contraction is fastest, or its end; 5 % to its top.

    At the midpoint the top eigenvalues contract by factors near -1, which keep the noise of fresh
    subsets: the end has half the error (softmax regression, m = 20 of 400, 400 steps).
    """
    top = ends.largest + 0.05 * abs(ends.largest)
    return max((top if noisy else (top + ends.smallest) / 2) + damping, 1e-12)


def _lowest(ends: Spectrum, damping: float) -> float:
    """Where the accelerated interval begins.

    Lanczos sees the smallest eigenvalue from above, so half of a positive one is taken: too low an
    end costs a few steps, too high a one many.
    """
    smallest = ends.smallest / 2 if ends.smallest > 0 else ends.smallest
    return max(smallest + damping, 1e-9 * abs(ends.largest))
