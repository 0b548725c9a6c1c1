"""Influence of a group of training points on a model's parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext.conjugate_gradients import cg
from fastif_ext.curvature import check_curvature, last_linear
from fastif_ext.data import Data, Rows, count, take
from fastif_ext.graphs import CudaGraph
from fastif_ext.lissa import lissa
from fastif_ext.loaders import rows_before
from fastif_ext.parameters import Params, Selection
from fastif_ext.passes import HERE, Passes
from fastif_ext.solvers import SolveResult, exact
from fastif_ext.variants import VARIANTS, Problem

if TYPE_CHECKING:
    from fastif_ext.samplers import SubsetSampler

SOLVERS: dict[str, Callable[..., SolveResult]] = {"lissa": lissa, "cg": cg, "exact": exact}


@dataclass
class InfluenceResult:
    """The parameter change that removing a group of points calls for, and how it was found."""

    delta: Tensor
    """The variant's x, [p] over all trainable parameters; 0 outside `params`."""
    gradient: Tensor
    """g, the mean gradient over the removed points; "if", "fif", "sif": over the selection."""
    solve: SolveResult
    """The solver's result: true residual, iterations, damping."""
    rows: Tensor | None
    """The rows of the training set that the Hessian was taken on; None for all of them."""
    variant: str
    step: float
    """step * delta is the change that theory predicts: n_c / n; 1 for "sif"."""


def influence(
    model: nn.Module,
    loss_fn: Callable[[Any, Tensor], Tensor],
    removed: Data | Tensor,
    train: Rows,
    *,
    variant: str = "if",
    params: Params = None,
    sampler: SubsetSampler | None = None,
    removed_sampler: SubsetSampler | None = None,
    curvature: str = "hessian",
    solver: str = "lissa",
    damping: float | str = "auto",
    tol: float = 1e-3,
    max_iter: int | None = None,
    chunk_size: int | None = None,
    cuda_graph: CudaGraph = "auto",
    passes: Passes = HERE,
    progress: bool = False,
) -> InfluenceResult:
    """The influence of removing some training points: delta = (H_S + damping I)^-1 g and its kin.

    g is the mean gradient over the removed points and H_S the weighted curvature on the sampled
    subset of the training set. Removing n_c of n points moves the minimum of the mean loss by
    ``+ (n_c / n) delta`` to first order, so delta is added, not subtracted:
    ``fastif_ext.apply_update(model, result.delta, result.step)``.

    With T the parameters that `params` selects, and H meaning H_S + damping I throughout:

    ======= ====================================================================================
    variant delta
    ======= ====================================================================================
    "if"    H^-1 g (Koh and Liang 2017); with `params` the same as "fif"
    "pif"   the entries T of H^-1 g over all trainable parameters, 0 elsewhere
    "fif"   H_TT^-1 g_T: all others are held fixed
    "gif"   argmin over x_T of |H_{:,T} x_T - g| (arXiv 2312.05586), by its normal equations:
            indefinite H does no harm, the condition number is squared, a step takes two products
    "sif"   I1 + I2 with r = n_c / (n - n_c), I1 = r H_TT^-1 g_T,
            I2 = r H_TT^-1 (H_TT - H_U) I1, H_U the curvature on the removed points (Basu, You and
            Feizi 2020). This is the published sum: see below.
    ======= ====================================================================================

    The published second-order sum expands the minimum for weight moved *towards* the group. For
    removal the second term has the opposite sign: I1 - I2 is the expansion of the retain form
    r H_retain^-1 g, which a sampler restricted to the retained rows gives to all orders. (The
    authors' code applies H^-2 in I2; these are the formulas.)

    Args:
        model: the trained model; it is left as it was.
        loss_fn: loss_fn(outputs, targets) -> mean loss, the one the model was trained with.
        removed: the points to remove: (inputs, targets), a Dataset or DataLoader, or an int64
            tensor of rows of `train`.
        train: the training set, (inputs, targets) or a map-style Dataset.
        variant: "if", "pif", "fif", "gif" or "sif".
        params: the parameters that may move; see Hessian and select_parameters.
        sampler: chooses the rows of `train` for H_S, with their weights; None takes all rows.
        removed_sampler: rows of `removed` that stand for all of it in g, with weights that add up
            to one in the mean, as ResidualSampler has them; None takes all.
        curvature: "hessian"; "gauss-newton", positive semi-definite; "linear-softmax", the exact
            Hessian of the last nn.Linear under cross-entropy, which `params` then defaults to.
        solver: "lissa", "cg" or "exact".
        damping: a number in the units of H, or "auto"; see fastif_ext.lissa.
        tol: relative residual to reach; of the normal equations for "gif".
        max_iter: at most this many iterations; by default 5000 for LiSSA.
        chunk_size: rows per chunk of a product; see Hessian.
        cuda_graph: whether the solver's products are recorded on CUDA; see fastif_ext.lissa.
        passes: who makes the passes over data: this process, or all ranks with
            fastif_ext.distributed.SharedPasses.
        progress: show progress bars.

    Returns:
        InfluenceResult(delta, gradient, solve, rows, variant, step).

    Raises:
        SolverDivergence: the damped Hessian of the subset is indefinite.
        ValueError: arguments that do not fit.

    Example:
        >>> import torch, fastif_ext as fi
        >>> x, y = torch.randn(50, 3), torch.randn(50, 1)
        >>> model = torch.nn.Linear(3, 1)
        >>> got = fi.influence(model, torch.nn.functional.mse_loss, torch.arange(5), (x, y))
        >>> got.delta.shape, got.solve.converged, got.step
        (torch.Size([4]), True, 0.1)
    """
    if variant not in VARIANTS:
        raise ValueError(f"influence: variant must be one of {tuple(VARIANTS)}, got {variant!r}")
    solve = make_solver(
        solver, tol=tol, max_iter=max_iter, cuda_graph=cuda_graph, progress=progress
    )
    check_curvature(curvature)
    if isinstance(train, DataLoader):
        raise TypeError("influence: train must be (inputs, targets) or a Dataset: rows are chosen")
    if curvature == "linear-softmax":
        if variant in ("pif", "gif"):
            raise ValueError(
                f"influence: variant {variant!r} needs the curvature of all parameters; use "
                f"curvature='hessian' or 'gauss-newton'"
            )
        params = last_linear(model) if params is None else params
    n = count(train)
    points: Data = (
        take(train, check_rows("removed", removed, n)) if isinstance(removed, Tensor) else removed
    )
    if isinstance(points, DataLoader):
        n_removed = rows_before(points, len(points))
    else:
        n_removed = count(points)
    subset, weights = subset_of("sampler", sampler, train)
    stand_ins, shares = subset_of("removed_sampler", removed_sampler, points)

    def on(data: Data, weights: Tensor | None) -> Callable[[Params], Any]:
        return lambda chosen: passes.curvature(
            curvature, model, loss_fn, data, weights=weights, params=chosen, chunk_size=chunk_size
        )

    formula = VARIANTS[variant](
        Problem(
            selection=Selection(model, params),
            params=params,
            curvature=on(subset, weights),
            removed_curvature=on(points, None),
            gradient=lambda chosen: passes.mean_gradient(
                model, loss_fn, stand_ins, weights=shares, params=chosen, chunk_size=chunk_size
            ),
            solve=solve,
            damping=damping,
            ratio=n_removed / n,
        )
    )
    return InfluenceResult(
        delta=formula.delta,
        gradient=formula.gradient,
        solve=formula.solve,
        rows=None if sampler is None else sampler.indices,
        variant=variant,
        step=formula.step,
    )


def make_solver(
    name: str,
    *,
    tol: float,
    max_iter: int | None,
    progress: bool,
    cuda_graph: CudaGraph = "auto",
) -> Callable[[Any, Tensor, float | str], SolveResult]:
    """solve(H, b, damping) by the solver of that name, LiSSA with at most 5000 steps by default."""
    if name not in SOLVERS:
        raise ValueError(f"solver must be one of {tuple(SOLVERS)}, got {name!r}")
    options: dict[str, Any] = {"tol": tol}
    if name != "exact":
        options |= {"progress": progress, "cuda_graph": cuda_graph}
        if max_iter is not None or name == "lissa":
            options["max_iter"] = 5000 if max_iter is None else max_iter
    return lambda H, b, damping: SOLVERS[name](H, b, damping=damping, **options)


def subset_of(name: str, sampler: SubsetSampler | None, data: Any) -> tuple[Any, Tensor | None]:
    """The sampler's rows of the data, and their weights."""
    if sampler is None:
        return data, None
    if not (hasattr(sampler, "indices") and hasattr(sampler, "weights")):
        raise TypeError(
            f"{name} must have .indices and .weights, as those of "
            f"fastif_ext.samplers have; got a {type(sampler).__name__}"
        )
    if isinstance(data, DataLoader):
        raise TypeError(f"{name} chooses rows, which a DataLoader has not; pass rows")
    return take(data, check_rows(f"{name}.indices", sampler.indices, count(data))), sampler.weights


def check_rows(name: str, rows: Tensor, n: int) -> Tensor:
    """Require row numbers, int64 and not empty, within [0, n)."""
    if rows.dtype != torch.int64 or rows.dim() != 1 or len(rows) == 0:
        raise ValueError(
            f"{name} must be a non-empty int64 tensor of row numbers, got {rows.dtype} "
            f"of shape {list(rows.shape)}"
        )
    if int(rows.min()) < 0 or int(rows.max()) >= n:
        raise ValueError(
            f"{name} must lie in [0, {n}), the rows of its data; got "
            f"{int(rows.min())} to {int(rows.max())}"
        )
    return rows
