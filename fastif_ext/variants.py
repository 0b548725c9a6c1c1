"""The formulas of influence on a group: IF, PIF, FIF, GIF and SIF.

H is the curvature, damped: H + damping I. T are the selected parameters, U the removed points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastif_ext.curvature import NormalEquations
from fastif_ext.parameters import Params, Selection
from fastif_ext.solvers import SolveResult
from fastif_ext.spectrum import resolve_damping


@dataclass
class Problem:
    """What a formula works with."""

    selection: Selection
    """T."""
    params: Params
    """What selects T."""
    curvature: Callable[[Params], Any]
    """H on the subset of the training set, over the parameters that the argument selects."""
    removed_curvature: Callable[[Params], Any]
    """The same on the removed points."""
    gradient: Callable[[Params], Tensor]
    """g, the mean gradient over the removed points."""
    solve: Callable[[Any, Tensor, float | str], SolveResult]
    """Solves (H + damping I) x = b."""
    damping: float | str
    ratio: float
    """n_c / n: how many of the training points are removed."""


@dataclass
class Formula:
    """What a formula gives."""

    delta: Tensor
    """Over all trainable parameters."""
    gradient: Tensor
    """g, over the parameters that the formula needs it on."""
    solve: SolveResult
    step: float
    """delta times this is the predicted change of the parameters."""


def selected(problem: Problem) -> Formula:
    """FIF: x_T = (H_TT + damping I)^-1 g_T; IF where T is everything."""
    g = problem.gradient(problem.params)
    result = problem.solve(problem.curvature(problem.params), g, problem.damping)
    return Formula(problem.selection.embed(result.x), g, result, problem.ratio)


def projected(problem: Problem) -> Formula:
    """PIF: the selected entries of (H + damping I)^-1 g over all parameters."""
    g = problem.gradient(None)
    result = problem.solve(problem.curvature(None), g, problem.damping)
    kept = problem.selection.embed(problem.selection.restrict(result.x))
    return Formula(kept, g, result, problem.ratio)


def generalised(problem: Problem) -> Formula:
    """GIF: x_T = argmin |(H + damping I)_{:,T} x_T - g|, by its normal equations."""
    g = problem.gradient(None)
    H = problem.curvature(None)
    damping, _ = resolve_damping(H, g, problem.damping)
    normal = NormalEquations(H, problem.selection, damping=damping)
    result = problem.solve(normal, normal.adjoint(g[None])[0], 0.0)
    result.damping = damping
    return Formula(problem.selection.embed(result.x), g, result, problem.ratio)


def second_order(problem: Problem) -> Formula:
    """SIF: I1 + I2, I1 = r H^-1 g, I2 = r H^-1 (H - H_U) I1, r = ratio / (1 - ratio), on T.

    delta is the change itself, its step is 1. A quadratic in one dimension shows what it is worth:
    losses a_i (theta - t_i)^2 / 2 with a = (1, 1, 1, 5), t = (0, 0, 0, 1), the last one removed.
    The minimum moves from .625 to 0; the change predicted is

    ============================================================ =======
    retraining                                                   -.6250
    retain form r H_retain^-1 g (a sampler of the retained rows) -.6250
    I1 - I2, its expansion                                       -.4688
    I1                                                           -.3125
    IF, ratio H^-1 g                                             -.2344
    I1 + I2, as published                                        -.1562
    I1 + I2 with H^-2 in I2, as in the authors' code             -.2344
    ============================================================ =======
    """
    if problem.ratio >= 1:
        raise ValueError("influence: variant 'sif' needs points that stay; all are removed")
    g = problem.gradient(problem.params)
    H = problem.curvature(problem.params)
    r = problem.ratio / (1 - problem.ratio)
    first = problem.solve(H, g, problem.damping)
    one = r * first.x
    removed = problem.removed_curvature(problem.params) @ one
    second = problem.solve(H, removed, first.damping)
    two = r * (one - second.x)
    first.iterations += second.iterations
    first.converged &= second.converged
    first.residual = first.residual.maximum(second.residual)
    first.history += second.history
    first.x = one + two
    return Formula(problem.selection.embed(first.x), g, first, 1.0)


VARIANTS: dict[str, Callable[[Problem], Formula]] = {
    "if": selected,
    "pif": projected,
    "fif": selected,
    "gif": generalised,
    "sif": second_order,
}
