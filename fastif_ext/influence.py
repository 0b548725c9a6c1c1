"""Influence of a group of training points on a model's parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastif_ext.curvature import Hessian
from fastif_ext.data import Data, count, take
from fastif_ext.lissa import lissa
from fastif_ext.objective import mean_gradient
from fastif_ext.parameters import Params
from fastif_ext.solvers import SolveResult, cg, exact

if TYPE_CHECKING:
    from fastif_ext.samplers import SubsetSampler

VARIANTS = ("if",)
SOLVERS: dict[str, Callable[..., SolveResult]] = {"lissa": lissa, "cg": cg, "exact": exact}


@dataclass
class InfluenceResult:
    """The parameter change that removing a group of points calls for, and how it was found."""

    delta: Tensor
    """(H_S + damping I)^-1 g, [p] over all trainable parameters; 0 outside `params`."""
    gradient: Tensor
    """g, the mean gradient over the removed points, over the selected parameters."""
    solve: SolveResult
    """The solver's result: true residual, iterations, damping."""
    rows: Tensor | None
    """The rows of the training set that the Hessian was taken on; None for all of them."""
    variant: str


def influence(
    model: nn.Module,
    loss_fn: Callable[[Any, Tensor], Tensor],
    removed: Data | Tensor,
    train: tuple[Any, Tensor] | Dataset[Any],
    *,
    variant: str = "if",
    params: Params = None,
    sampler: SubsetSampler | None = None,
    solver: str = "lissa",
    damping: float | str = "auto",
    tol: float = 1e-3,
    max_iter: int | None = None,
    chunk_size: int | None = None,
    progress: bool = False,
) -> InfluenceResult:
    """The influence of removing some training points: delta = (H_S + damping I)^-1 g.

    g is the mean gradient over the removed points and H_S the weighted Hessian on the sampled
    subset of the training set (Koh and Liang 2017). Removing n_c of n points moves the minimum of
    the mean loss by ``+ (n_c / n) delta`` to first order, so delta is added, not subtracted:
    ``fastif_ext.apply_update(model, result.delta, n_c / n)``.

    Args:
        model: the trained model; it is left as it was.
        loss_fn: loss_fn(outputs, targets) -> mean loss, the one the model was trained with.
        removed: the points to remove: (inputs, targets), a Dataset or DataLoader, or an int64
            tensor of rows of `train`.
        train: the training set, (inputs, targets) or a map-style Dataset.
        variant: "if", all of `params` at once.
        params: the parameters that may move; see Hessian.
        sampler: chooses the rows of `train` for H_S, with their weights; None takes all rows.
        solver: "lissa", "cg" or "exact".
        damping: a number in the units of H, or "auto"; see fastif_ext.lissa.
        tol: relative residual to reach.
        max_iter: at most this many products; by default 5000 for LiSSA.
        chunk_size: rows per chunk of a product; see Hessian.
        progress: show progress bars.

    Returns:
        InfluenceResult(delta, gradient, solve, rows, variant).

    Raises:
        SolverDivergence: the damped Hessian of the subset is indefinite.
        ValueError: arguments that do not fit.

    Example:
        >>> import torch, fastif_ext as fi
        >>> x, y = torch.randn(50, 3), torch.randn(50, 1)
        >>> model = torch.nn.Linear(3, 1)
        >>> got = fi.influence(model, torch.nn.functional.mse_loss, torch.arange(5), (x, y))
        >>> got.delta.shape, got.solve.converged
        (torch.Size([4]), True)
    """
    if variant not in VARIANTS:
        raise ValueError(f"influence: variant must be one of {VARIANTS}, got {variant!r}")
    if solver not in SOLVERS:
        raise ValueError(f"influence: solver must be one of {tuple(SOLVERS)}, got {solver!r}")
    if isinstance(train, DataLoader):
        raise TypeError("influence: train must be (inputs, targets) or a Dataset: rows are chosen")
    n = count(train)
    points: Data = (
        take(train, _check_rows("removed", removed, n)) if isinstance(removed, Tensor) else removed
    )
    gradient = mean_gradient(model, loss_fn, points, params=params, chunk_size=chunk_size)
    subset, weights = train, None
    if sampler is not None:
        if not (hasattr(sampler, "indices") and hasattr(sampler, "weights")):
            raise TypeError(
                f"influence: sampler must have .indices and .weights, as those of "
                f"fastif_ext.samplers have; got a {type(sampler).__name__}"
            )
        subset = take(train, _check_rows("sampler.indices", sampler.indices, n))
        weights = sampler.weights
    H = Hessian(model, loss_fn, subset, weights=weights, params=params, chunk_size=chunk_size)
    options: dict[str, Any] = {"damping": damping, "tol": tol}
    if solver != "exact":
        options["progress"] = progress
        if max_iter is not None or solver == "lissa":
            options["max_iter"] = 5000 if max_iter is None else max_iter
    result = SOLVERS[solver](H, gradient, **options)
    return InfluenceResult(
        delta=H.selection.embed(result.x),
        gradient=gradient,
        solve=result,
        rows=None if sampler is None else sampler.indices,
        variant=variant,
    )


def _check_rows(name: str, rows: Tensor, n: int) -> Tensor:
    if rows.dtype != torch.int64 or rows.dim() != 1 or len(rows) == 0:
        raise ValueError(
            f"influence: {name} must be a non-empty int64 tensor of row numbers, got {rows.dtype} "
            f"of shape {list(rows.shape)}"
        )
    if int(rows.min()) < 0 or int(rows.max()) >= n:
        raise ValueError(
            f"influence: {name} must lie in [0, {n}), the rows of train; got "
            f"{int(rows.min())} to {int(rows.max())}"
        )
    return rows
