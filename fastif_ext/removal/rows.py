"""Remove any rows, or correct their labels: follow the minimum of the objective that is left."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastif_ext.data import Rows, relabelled, take
from fastif_ext.objective import Loss
from fastif_ext.parameters import Params
from fastif_ext.passes import HERE, Passes
from fastif_ext.removal.newton import Edit, How
from fastif_ext.removal.report import EditReport
from fastif_ext.removal.subsets import Chooser


def remove_rows(
    model: nn.Module,
    train: Rows,
    rows: Tensor,
    *,
    test: Rows | None = None,
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
    passes: Passes = HERE,
    progress: bool = False,
) -> EditReport:
    """Change a classifier as if some training rows had not been there.

    The first step is the influence function in its retain form, n_c / (n - n_c) (H_retain + damping
    I)^-1 (g - g_all); further `steps` are Newton steps on the objective that is left (see
    newton.py), each with a fresh curvature subset. Weight decay or early stopping leave a gradient
    g_all over the whole training set, which is part of every row's own: the textbook formula, which
    takes it for 0, can be wrong by more than the whole change.

    Args:
        model: maps inputs to logits [b, Y]; it is copied, never changed.
        train: the training set: a map-style dataset of (inputs, label), or (inputs, labels).
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
        passes: who makes the passes over data: this process, or all ranks with
            fastif_ext.distributed.SharedPasses; then all return the same report.
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
    how = How(
        steps=steps,
        sampler=sampler,
        samples=samples,
        loss_fn=loss_fn,
        params=params,
        curvature=curvature,
        solver=solver,
        damping=damping,
        tol=tol,
        max_iter=max_iter,
        chunk_size=chunk_size,
        seed=seed,
        passes=passes,
        progress=progress,
    )
    with how.together("remove_rows", rows=rows):
        edit = Edit("remove_rows", model, train, rows, test, how)
        stays = torch.ones(edit.n, dtype=torch.bool)
        stays[edit.rows] = False
        kept = stays.nonzero().flatten()
        if len(kept) == 0:
            raise ValueError(f"remove_rows: rows are all {edit.n} rows of train; some must stay")
        ratio = len(edit.rows) / len(kept)

        def first(original: Callable[[], Tensor]) -> Tensor:
            return ratio * (original() - how.gradient(model, take(edit.train, edit.rows)))

        return edit.run(after=edit.train, kept=kept, first=first)


def correct_labels(
    model: nn.Module,
    train: Rows,
    rows: Tensor,
    labels: Tensor,
    *,
    test: Rows | None = None,
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
    passes: Passes = HERE,
    progress: bool = False,
) -> EditReport:
    """Change a classifier as if some training rows had had other labels.

    The first step is the influence function of the correction, (n_c / n) (H + damping I)^-1
    (g_old - g_new), H the curvature with the new labels; further `steps` are Newton steps on the
    corrected objective (see newton.py).

    Args:
        model: maps inputs to logits [b, Y]; it is copied, never changed.
        train: the training set with its old labels, as for remove_rows.
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
        passes: who makes the passes over data: this process, or all ranks with
            fastif_ext.distributed.SharedPasses; then all return the same report.
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
    how = How(
        steps=steps,
        sampler=sampler,
        samples=samples,
        loss_fn=loss_fn,
        params=params,
        curvature=curvature,
        solver=solver,
        damping=damping,
        tol=tol,
        max_iter=max_iter,
        chunk_size=chunk_size,
        seed=seed,
        passes=passes,
        progress=progress,
    )
    with how.together("correct_labels", rows=rows, labels=labels):
        edit = Edit("correct_labels", model, train, rows, test, how)
        new = edit.in_order(rows, labels)
        corrected = relabelled(edit.train, edit.rows, new)

        def first(original: Callable[[], Tensor]) -> Tensor:
            after, before = (
                how.gradient(model, take(data, edit.rows)) for data in (corrected, edit.train)
            )
            return len(edit.rows) / edit.n * (after - before)

        return edit.run(after=corrected, kept=torch.arange(edit.n), first=first, new_labels=new)
