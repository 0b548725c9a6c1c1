"""Remove any rows, or correct their labels: follow the minimum of the objective that is left.

With L the mean loss that the model theta_0 was trained on and L_e the edited one (without the rows,
or with their new labels), the edited model solves

    grad L_e(theta) - grad L(theta_0) + damping (theta - theta_0) = 0,

which theta_0 solves for L_e = L: the proximal Bregman objective of Bae et al. 2022. Damping equal
to the weight decay of training makes it retraining. One Newton step from theta_0 is the influence
function; more steps, each on a fresh subset, follow the minimum further.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from fastif_ext.curvature import make_curvature
from fastif_ext.data import count, device_of, relabelled, take
from fastif_ext.influence import check_rows, make_solver
from fastif_ext.memory import peak_memory
from fastif_ext.metrics import fit, predict
from fastif_ext.objective import Loss, mean_gradient
from fastif_ext.parameters import Params, Selection, apply_update, flat_parameters
from fastif_ext.removal.report import EditReport
from fastif_ext.removal.subsets import Chooser, curvature_subset
from fastif_ext.solvers import SolveResult


def remove_rows(
    model: nn.Module,
    train: Dataset[Any],
    rows: Tensor,
    *,
    test: Dataset[Any] | None = None,
    steps: int = 1,
    sampler: Chooser = None,
    samples: int = 400,
    loss_fn: Loss = cross_entropy,
    params: Params = None,
    curvature: str = "hessian",
    solver: str = "cg",
    damping: float | str = "auto",
    tol: float = 1e-3,
    max_iter: int | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> EditReport:
    """Change a classifier as if some training rows had not been there.

    The first step is the influence function in its retain form, n_c / (n - n_c) (H_retain + damping
    I)^-1 (g - g_all); further `steps` are Newton steps on the objective that is left (see this
    module), each with a fresh curvature subset. Weight decay or early stopping leave a gradient
    g_all over the whole training set, which is part of every row's own: the textbook formula, which
    takes it for 0, can be wrong by more than the whole change.

    Args:
        model: maps inputs to logits [b, Y]; it is copied, never changed.
        train: the training set, a map-style dataset of (inputs, label).
        rows: int64, rows of `train` to remove; repeats do not count twice.
        test: a data set to report on besides.
        steps: Newton steps; 1 is the influence function.
        sampler: chooses the rows for the curvature, as in remove_class.
        samples: rows that the default sampler draws.
        loss_fn: loss_fn(outputs, labels) -> mean loss, the one the model was trained with.
        params: the parameters that may move; see Hessian.
        curvature: "hessian", "gauss-newton" or "linear-softmax"; see influence.
        solver: "cg", "lissa" or "exact".
        damping: a number, best the weight decay of training, or "auto" (see lissa), taken at the
            first step for all.
        tol: relative residual of each solve.
        max_iter: most iterations of a solve.
        chunk_size: rows per chunk of a product.
        seed: of the default sampler.
        progress: show progress bars.

    Returns:
        EditReport, with the new model as ``.model``.

    Raises:
        ValueError: no rows, all rows, rows out of range, steps or samples below 1.
        SolverDivergence: the damped curvature is indefinite.

    Example:
        >>> import torch, fastif_ext as fi
        >>> x = torch.randn(60, 3)
        >>> data = torch.utils.data.TensorDataset(x, x.argmax(1))
        >>> report = fi.remove_rows(torch.nn.Linear(3, 3), data, torch.arange(5), damping=0.1)
        >>> report.delta.shape, len(report.norms)
        (torch.Size([12]), 1)
    """
    edit = _Edit("remove_rows", model, train, rows, test, steps, samples)
    stays = torch.ones(edit.n, dtype=torch.bool)
    stays[edit.rows] = False
    kept = stays.nonzero().flatten()
    if len(kept) == 0:
        raise ValueError(f"remove_rows: rows are all {edit.n} rows of train; some must stay")
    ratio = len(edit.rows) / len(kept)

    def first(original: Callable[[], Tensor]) -> Tensor:
        removed = take(train, edit.rows)
        g = mean_gradient(model, loss_fn, removed, params=params, chunk_size=chunk_size)
        return ratio * (original() - g)

    return edit.run(
        after=train,
        kept=kept,
        first=first,
        sampler=sampler,
        loss_fn=loss_fn,
        params=params,
        curvature=curvature,
        solve=make_solver(solver, tol=tol, max_iter=max_iter, progress=progress),
        damping=damping,
        chunk_size=chunk_size,
        seed=seed,
    )


def correct_labels(
    model: nn.Module,
    train: Dataset[Any],
    rows: Tensor,
    labels: Tensor,
    *,
    test: Dataset[Any] | None = None,
    steps: int = 1,
    sampler: Chooser = None,
    samples: int = 400,
    loss_fn: Loss = cross_entropy,
    params: Params = None,
    curvature: str = "hessian",
    solver: str = "cg",
    damping: float | str = "auto",
    tol: float = 1e-3,
    max_iter: int | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> EditReport:
    """Change a classifier as if some training rows had had other labels.

    The first step is the influence function of the correction, (n_c / n) (H + damping I)^-1
    (g_old - g_new), H the curvature with the new labels; further `steps` are Newton steps on the
    corrected objective (see this module).

    Args:
        model: maps inputs to logits [b, Y]; it is copied, never changed.
        train: the training set with its old labels, a map-style dataset of (inputs, label).
        rows: int64, the rows to correct, each once.
        labels: int64, the new label of each.
        test: a data set to report on besides; and the rest as in remove_rows.
        steps: Newton steps; 1 is the influence function.
        sampler: chooses the rows for the curvature.
        samples: rows that the default sampler draws.
        loss_fn: loss_fn(outputs, labels) -> mean loss.
        params: the parameters that may move.
        curvature: "hessian", "gauss-newton" or "linear-softmax".
        solver: "cg", "lissa" or "exact".
        damping: a number or "auto".
        tol: relative residual of each solve.
        max_iter: most iterations of a solve.
        chunk_size: rows per chunk of a product.
        seed: of the default sampler.
        progress: show progress bars.

    Returns:
        EditReport, with the new model as ``.model``; its edited rows are held to the new labels.

    Raises:
        ValueError: labels that do not go with rows or lie outside the model's classes; rows as in
            remove_rows.

    Example:
        >>> import torch, fastif_ext as fi
        >>> x = torch.randn(60, 3)
        >>> data = torch.utils.data.TensorDataset(x, x.argmax(1).roll(1))
        >>> rows = torch.arange(30)
        >>> report = fi.correct_labels(
        ...     torch.nn.Linear(3, 3), data, rows, x[rows].argmax(1), damping=0.1
        ... )
        >>> report.edited_after.loss < report.edited_before.loss
        True
    """
    edit = _Edit("correct_labels", model, train, rows, test, steps, samples)
    labels = torch.as_tensor(labels).cpu()
    if len(edit.rows) != len(torch.as_tensor(rows)):
        raise ValueError("correct_labels: rows has repeats; give each row once")
    if labels.shape != edit.rows.shape or labels.dtype != torch.int64:
        raise ValueError(
            f"correct_labels: labels must be int64, one for each of the {len(edit.rows)} rows; got "
            f"{labels.dtype} of shape {list(labels.shape)}"
        )
    classes = edit.before.logits.shape[1]
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"correct_labels: labels must be between 0 and {classes - 1}, the model's classes; got "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    order = torch.as_tensor(rows).argsort().cpu()
    labels = labels[order]
    corrected = relabelled(train, edit.rows, labels)

    def first(original: Callable[[], Tensor]) -> Tensor:
        new, old = (
            mean_gradient(
                model, loss_fn, take(data, edit.rows), params=params, chunk_size=chunk_size
            )
            for data in (corrected, train)
        )
        return len(edit.rows) / edit.n * (new - old)

    return edit.run(
        after=corrected,
        kept=torch.arange(edit.n),
        first=first,
        new_labels=labels,
        sampler=sampler,
        loss_fn=loss_fn,
        params=params,
        curvature=curvature,
        solve=make_solver(solver, tol=tol, max_iter=max_iter, progress=progress),
        damping=damping,
        chunk_size=chunk_size,
        seed=seed,
    )


class _Edit:
    """One edit of a model's training data under way."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        train: Dataset[Any],
        rows: Tensor,
        test: Dataset[Any] | None,
        steps: int,
        samples: int,
    ) -> None:
        for argument, value in (("steps", steps), ("samples", samples)):
            if value < 1:
                raise ValueError(f"{name}: {argument} must be at least 1, got {value}")
        self.start = time.perf_counter()
        self.n = count(train)
        self.rows = check_rows("rows", rows, self.n).unique().cpu()
        self.model, self.train, self.test = model, train, test
        self.steps, self.samples = steps, samples
        self.before = predict(model, train)

    def run(
        self,
        *,
        after: Dataset[Any],
        kept: Tensor,
        first: Callable[[Callable[[], Tensor]], Tensor],
        sampler: Chooser,
        loss_fn: Loss,
        params: Params,
        curvature: str,
        solve: Callable[[Any, Tensor, float | str], SolveResult],
        damping: float | str,
        chunk_size: int | None,
        seed: int,
        new_labels: Tensor | None = None,
    ) -> EditReport:
        """Newton steps on the objective of the rows `kept` of the data set `after`."""
        selection = Selection(self.model, params)
        origin = flat_parameters(self.model)
        labels = self.before.labels.clone()
        if new_labels is not None:
            labels[self.rows] = new_labels
        current, logits = self.model, self.before.logits
        lam, norms, iterations, converged = damping, [], 0, True

        def slope_of(at: nn.Module, data: Dataset[Any]) -> Tensor:
            return mean_gradient(at, loss_fn, data, params=params, chunk_size=chunk_size)

        @cache
        def original() -> Tensor:
            return slope_of(self.model, self.train)

        with peak_memory(device_of(self.model)) as peak:
            for k in range(self.steps):
                subset = curvature_subset(
                    sampler, logits, labels, kept, samples=self.samples, step=k, seed=seed
                )
                H = make_curvature(
                    curvature,
                    current,
                    loss_fn,
                    take(after, subset.indices),
                    weights=subset.weights,
                    params=params,
                    chunk_size=chunk_size,
                )
                if k == 0:
                    slope = first(original)
                else:
                    moved = selection.restrict(flat_parameters(current) - origin)
                    slope = slope_of(current, take(after, kept)) - original() + float(lam) * moved
                result = solve(H, slope, lam)
                lam = result.damping
                iterations += result.iterations
                converged &= result.converged
                norms.append(float(result.x.norm()))
                current = apply_update(current, selection.embed(result.x), -1.0)
                if k + 1 < self.steps:
                    logits = predict(current, self.train).logits
        now = predict(current, self.train)
        others = torch.ones(self.n, dtype=torch.bool)
        others[self.rows] = False
        return EditReport(
            model=current,
            delta=flat_parameters(current) - origin,
            edited_before=fit(self.before.logits[self.rows], labels[self.rows]),
            edited_after=fit(now.logits[self.rows], labels[self.rows]),
            kept_before=fit(self.before.logits[others], labels[others]),
            kept_after=fit(now.logits[others], labels[others]),
            test_before=None if self.test is None else fit(*predict(self.model, self.test)),
            test_after=None if self.test is None else fit(*predict(current, self.test)),
            damping=float(lam),
            iterations=iterations,
            converged=converged,
            norms=norms,
            seconds=time.perf_counter() - self.start,
            peak=peak,
        )
