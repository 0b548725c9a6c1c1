"""Newton steps on the objective that is left once some training rows are gone, or have new labels.

With L the mean loss that the model theta_0 was trained on and L_e the edited one, the edited model
solves

    grad L_e(theta) - grad L(theta_0) + damping (theta - theta_0) = 0,

which theta_0 solves for L_e = L: the proximal Bregman objective of Bae et al. 2022. Damping equal
to the weight decay of training makes it retraining. One Newton step from theta_0 is the influence
function; more steps, each on a fresh subset, follow the minimum further.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastif_ext.data import Rows, count, device_of, map_style, take
from fastif_ext.influence import check_rows, make_solver
from fastif_ext.memory import peak_memory
from fastif_ext.metrics import Fit, Predictions, fit, predict
from fastif_ext.objective import Loss
from fastif_ext.parameters import Params, Selection, apply_update, flat_parameters
from fastif_ext.passes import Passes
from fastif_ext.removal.report import EditReport
from fastif_ext.removal.subsets import Chooser, curvature_subset
from fastif_ext.samplers import SubsetSampler
from fastif_ext.solvers import SolveResult

OWN = ("loss_fn", "passes", "chunk_size", "progress")  # of How: each rank's own affair


@dataclass(kw_only=True)
class How:
    """How an edit is made: what remove_rows and correct_labels are told alike."""

    steps: int
    sampler: Chooser
    samples: int
    loss_fn: Loss
    params: Params
    curvature: str
    solver: str
    damping: float | str
    tol: float
    max_iter: int | None
    chunk_size: int | None
    seed: int
    passes: Passes
    progress: bool

    def together(self, name: str, **facts: Any) -> AbstractContextManager[None]:
        """Around the edit: all who share its passes enter it with the same facts."""
        facts |= {f.name: getattr(self, f.name) for f in fields(self) if f.name not in OWN}
        facts["sampler"] = getattr(self.sampler, "indices", self.sampler)
        return self.passes.together(name, **facts)

    def gradient(self, model: nn.Module, data: Dataset[Any]) -> Tensor:
        """Of the mean loss, over the selected parameters."""
        return self.passes.mean_gradient(
            model,
            self.loss_fn,
            data,
            weights=None,
            params=self.params,
            chunk_size=self.chunk_size,
        )

    def solve(
        self, model: nn.Module, data: Dataset[Any], subset: SubsetSampler, b: Tensor, damping: Any
    ) -> SolveResult:
        """(H_S + damping I)^-1 b."""
        H = self.passes.curvature(
            self.curvature,
            model,
            self.loss_fn,
            take(data, subset.indices),
            weights=subset.weights,
            params=self.params,
            chunk_size=self.chunk_size,
        )
        solver = make_solver(
            self.solver, tol=self.tol, max_iter=self.max_iter, progress=self.progress
        )
        return solver(H, b, damping)


class Edit:
    """One edit of a model's training data under way."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        train: Rows,
        rows: Tensor,
        test: Rows | None,
        how: How,
    ) -> None:
        for argument, value in (("steps", how.steps), ("samples", how.samples)):
            if value < 1:
                raise ValueError(f"{name}: {argument} must be at least 1, got {value}")
        self.start = time.perf_counter()
        train = map_style(f"{name}: train", train)
        self.n = count(train)
        self.rows = check_rows("rows", rows, self.n).unique().cpu()
        self.model, self.train, self.how = model, train, how
        self.test = None if test is None else map_style(f"{name}: test", test)
        self.before = self.predict(model, train)

    def predict(self, model: nn.Module, data: Dataset[Any]) -> Predictions:
        """Logits and labels of a whole data set."""
        return predict(model, data, passes=self.how.passes)

    def in_order(self, rows: Tensor, labels: Tensor) -> Tensor:
        """The new labels, in the order of self.rows."""
        rows, labels = (torch.as_tensor(t).cpu() for t in (rows, labels))
        if len(self.rows) != len(rows):
            raise ValueError("correct_labels: rows has repeats; give each row once")
        if labels.shape != self.rows.shape or labels.dtype != torch.int64:
            raise ValueError(
                f"correct_labels: labels must be int64, one for each of the {len(rows)} rows; got "
                f"{labels.dtype} of shape {list(labels.shape)}"
            )
        classes = self.before.logits.shape[1]
        if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(
                f"correct_labels: labels must be between 0 and {classes - 1}, the model's classes; "
                f"got {int(labels.min())} to {int(labels.max())}"
            )
        return labels[rows.argsort()]

    def run(
        self,
        *,
        after: Dataset[Any],
        kept: Tensor,
        first: Callable[[Callable[[], Tensor]], Tensor],
        new_labels: Tensor | None = None,
    ) -> EditReport:
        """Newton steps on the objective of the rows `kept` of the data set `after`."""
        how = self.how
        selection = Selection(self.model, how.params)
        origin = flat_parameters(self.model)
        labels = self.before.labels.clone()
        if new_labels is not None:
            labels[self.rows] = new_labels
        current, logits = self.model, self.before.logits
        lam, norms, iterations, converged = how.damping, [], 0, True

        @cache
        def original() -> Tensor:
            return how.gradient(self.model, self.train)

        with peak_memory(device_of(self.model)) as peak:
            for k in range(how.steps):
                subset = curvature_subset(
                    how.sampler,
                    logits,
                    labels,
                    kept,
                    samples=how.samples,
                    step=k,
                    seed=how.seed,
                )
                if k == 0:
                    slope = first(original)
                else:
                    moved = selection.restrict(flat_parameters(current) - origin)
                    slope = how.gradient(current, take(after, kept)) - original()
                    slope += float(lam) * moved
                result = how.solve(current, after, subset, slope, lam)
                lam = result.damping
                iterations += result.iterations
                converged &= result.converged
                norms.append(float(result.x.norm()))
                current = apply_update(current, selection.embed(result.x), -1.0)
                if k + 1 < how.steps:
                    logits = self.predict(current, self.train).logits
        now = self.predict(current, self.train)
        others = torch.ones(self.n, dtype=torch.bool)
        others[self.rows] = False
        return EditReport(
            model=current,
            delta=flat_parameters(current) - origin,
            edited_before=fit(self.before.logits[self.rows], labels[self.rows]),
            edited_after=fit(now.logits[self.rows], labels[self.rows]),
            kept_before=fit(self.before.logits[others], labels[others]),
            kept_after=fit(now.logits[others], labels[others]),
            test_before=self._on_test(self.model),
            test_after=self._on_test(current),
            damping=float(lam),
            iterations=iterations,
            converged=converged,
            norms=norms,
            seconds=time.perf_counter() - self.start,
            peak=peak,
        )

    def _on_test(self, model: nn.Module) -> Fit | None:
        return None if self.test is None else fit(*self.predict(model, self.test))
