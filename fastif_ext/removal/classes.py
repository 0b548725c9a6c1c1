"""Class removal: make a trained model forget one class without retraining it.

A direction is ``x = (H_S + damping I)^-1 g``, g the mean gradient over the class's training rows
and H_S the curvature on a subset of the rows that stay. First-order theory says
``theta' = theta + n_c / (n - n_c) x``; useful steps are several times longer, so the step has to be
chosen, and the direction looked up again on the way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from fastif_ext.data import Rows, device_of, map_style, take
from fastif_ext.influence import InfluenceResult, influence
from fastif_ext.memory import peak_memory
from fastif_ext.metrics import class_metrics, predict, standing
from fastif_ext.parameters import apply_update, flat_parameters
from fastif_ext.passes import HERE, Passes
from fastif_ext.removal.report import Clock, RemovalReport, StepRecord
from fastif_ext.removal.search import Guard, Start, best_on_test, shortest_step
from fastif_ext.removal.subsets import Chooser, curvature_subset
from fastif_ext.samplers import CurvatureSampler, ResidualSampler, SubsetSampler

_REMEDY = "the direction may be poor: try more samples, larger damping or more linearisations"


def remove_class(
    model: nn.Module,
    train: Rows,
    class_index: int,
    *,
    test: Rows | None = None,
    sampler: Chooser = None,
    samples: int = 400,
    removed_samples: int | None = 512,
    protocol: str = "default",
    linearisations: int = 2,
    loss_fn: Callable[[Any, Tensor], Tensor] = nn.functional.cross_entropy,
    target: float = 0.01,
    step_norm: float | None = None,
    max_steps: int = 100,
    seed: int = 0,
    passes: Passes = HERE,
    progress: bool = False,
    **solve: Any,
) -> RemovalReport:
    """Remove a class from a trained model by influence-function updates.

    ``protocol="default"`` looks for the shortest way after which accuracy on the class's own
    *training* rows is below `target`; the test set is only reported. The way is cut into
    `linearisations` parts: after each, direction, gradient and curvature subset are taken anew at
    the parameters reached. No part is more than a tenth longer than its share of the first
    estimate; up to twice as many are taken; the last is the one with the best F1 on training rows.
    Curvature is that of the rows that stay. No step is taken that costs more than a tenth of the
    accuracy on the other classes' training rows (at most 1000 are looked at): a long step along a
    poor direction forgets the class only because it forgets everything.

    ``protocol="paper"`` is the predecessor's procedure (arXiv 2312.05586): one direction, with the
    curvature of all rows; add it, normalised, again and again and keep the best F1 *on the test
    set*. That selects on the test set, so its F1 is optimistic; use it to compare with published
    figures.

    Args:
        model: maps inputs to logits; it is copied, never changed.
        train: the training set: a map-style dataset of (inputs, label), or (inputs, labels).
        class_index: the class to remove.
        test: where the report is measured; by default `train`. Required for protocol="paper".
        sampler: chooses the rows for the curvature. None: a fresh systematic CurvatureSampler of
            `samples` rows at every linearisation. A callable (extracted, step) -> sampler chooses
            among the rows that stay, given their logits and labels at the current parameters. A
            sampler of rows of `train` is used as it is, its rows of the class left out and the
            weights scaled up accordingly (not in protocol="paper").
        samples: rows that the default sampler draws.
        removed_samples: rows of the class, drawn by ResidualSampler, that stand for all of it in
            the gradient; None takes all. The paper's protocol takes all.
        protocol: "default" or "paper".
        linearisations: parts of the way in the default protocol; 1 is one direction.
        loss_fn: loss_fn(outputs, labels) -> mean loss, the one the model was trained with.
        target: self-accuracy that the default protocol goes below.
        step_norm: length of one step of protocol="paper"; by default |theta| / 200.
        max_steps: most steps that protocol="paper" adds.
        seed: of the samplers.
        passes: who makes the passes over data: this process, or all ranks with
            fastif_ext.distributed.SharedPasses; then all return the same report.
        progress: show progress bars.
        **solve: passed on to fastif_ext.influence: params, variant, curvature, solver, damping ...
            The solver is by default "cg", of protocol="paper" "lissa": both come to the same
            solution, cg with fewer products.

    Returns:
        RemovalReport, with the new model as ``.model``.

    Warns:
        UserWarning: the target was not reached, or the other classes are broken (only the paper's
            protocol can do that).

    Raises:
        ValueError: an unknown protocol, a class without training rows, a missing test set.

    Example:
        >>> import torch, fastif_ext as fi
        >>> y = torch.arange(90) % 3
        >>> x = 3 * torch.eye(3)[y] + 0.1 * torch.randn(90, 3)
        >>> data = torch.utils.data.TensorDataset(x, y)
        >>> model = torch.nn.Linear(3, 3)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.eye(3)), model.bias.zero_()
        >>> report = fi.remove_class(model, data, 1, damping=0.01)
        >>> report.self_accuracy < 0.01 < 0.99 < report.remaining_accuracy
        True
    """
    if protocol not in ("default", "paper"):
        raise ValueError(f"remove_class: protocol must be 'default' or 'paper', got {protocol!r}")
    if protocol == "paper" and test is None:
        raise ValueError("remove_class: protocol='paper' selects on the test set; pass test=")
    if not 0 < target < 1:
        raise ValueError(f"remove_class: target must be between 0 and 1, got {target}")
    for name, value in (
        ("linearisations", linearisations),
        ("samples", samples),
        ("removed_samples", removed_samples),
        ("max_steps", max_steps),
    ):
        if value is not None and value < 1:
            raise ValueError(f"remove_class: {name} must be at least 1, got {value}")
    if step_norm is not None and not step_norm > 0:
        raise ValueError(f"remove_class: step_norm must be positive, got {step_norm}")
    train = map_style("remove_class: train", train)
    test = None if test is None else map_style("remove_class: test", test)
    solve.setdefault("solver", "cg" if protocol == "default" else "lissa")
    inputs = model, train, class_index, sampler, samples, removed_samples, loss_fn, seed, passes
    shared = passes.together(
        "remove_class",
        class_index=class_index,
        protocol=protocol,
        sampler=getattr(sampler, "indices", sampler),
        samples=samples,
        removed_samples=removed_samples,
        linearisations=linearisations,
        target=target,
        step_norm=step_norm,
        seed=seed,
        **solve,
    )
    with shared:
        with peak_memory(device_of(model)) as peak:
            job = _Removal(*inputs, progress, solve)
            if protocol == "paper":
                assert test is not None
                edited = job.along_one_direction(test, step_norm, max_steps)
            else:
                edited = job.along_new_directions(linearisations, target)
        report = RemovalReport(
            model=edited,
            class_index=class_index,
            protocol=protocol,
            before=(
                standing(job.original, class_index)
                if test is None
                else class_metrics(model, test, class_index, passes=passes)
            ),
            after=class_metrics(
                edited, train if test is None else test, class_index, passes=passes
            ),
            delta=flat_parameters(edited) - flat_parameters(model),
            step=job.step,
            theory_step=job.theory_step,
            target_reached=job.reached,
            history=job.history,
            directions=job.directions,
            norms=job.norms,
            kept_before=job.guard.before,
            kept_after=job.guard.of(edited),
            seconds=job.clock.laps,
            peak=peak,
        )
    if not report.target_reached:
        warnings.warn(
            f"self-accuracy on the training rows of class {class_index} stayed at {job.left:.3f}, "
            f"target {target}; {_REMEDY}",
            stacklevel=2,
        )
    if report.broken:
        warnings.warn(
            f"the edited model is broken: accuracy on training rows of the other classes fell from "
            f"{report.kept_before.accuracy:.3f} to {report.kept_after.accuracy:.3f}; {_REMEDY}",
            stacklevel=2,
        )
    return report


class _Removal:
    """One removal under way."""

    def __init__(
        self,
        model: nn.Module,
        train: Dataset[Any],
        class_index: int,
        sampler: Chooser,
        samples: int,
        removed_samples: int | None,
        loss_fn: Callable[[Any, Tensor], Tensor],
        seed: int,
        passes: Passes,
        progress: bool,
        solve: dict[str, Any],
    ) -> None:
        self.clock = Clock()
        self.model, self.train, self.class_index = model, train, class_index
        self.sampler, self.samples, self.removed_samples = sampler, samples, removed_samples
        self.loss_fn, self.seed, self.passes = loss_fn, seed, passes
        self.progress, self.solve = progress, solve
        self.original = predict(model, train, progress=progress, passes=passes)
        self.got = self.original  # of the model reached so far
        own = self.got.labels == class_index
        self.removed_rows, self.kept_rows = (rows.nonzero().flatten() for rows in (own, ~own))
        n, n_removed = len(own), len(self.removed_rows)
        if not 0 < n_removed < n:
            raise ValueError(
                f"remove_class: class_index = {class_index} has {n_removed} of {n} training rows; "
                f"the labels are {self.got.labels.unique().tolist()}"
            )
        self.removed = take(train, self.removed_rows)
        self.guard = Guard(model, train, self.kept_rows, got=self.got, passes=passes)
        self.theory_step = n_removed / (n - n_removed)
        self.step, self.reached = 0.0, True
        self.left = 0.0
        """Self-accuracy on the training rows where the last step ended."""
        self.history: list[StepRecord] = []
        self.directions: list[InfluenceResult] = []
        self.norms: list[float] = []

    def along_new_directions(self, parts: int, target: float) -> nn.Module:
        """The default protocol; returns the edited copy."""
        current, unit = self.model, None
        for k in tqdm(range(2 * parts), desc="linearisations", disable=not self.progress):
            if k > 0:
                self.got = predict(current, self.train, progress=self.progress, passes=self.passes)
            direction = self._direction(current, k)
            length = float(direction.delta.norm())
            limit = None if unit is None or length == 0 else unit / length
            self.step, tried, self.reached = shortest_step(
                current,
                direction.delta,
                self.removed,
                self.class_index,
                first=self.theory_step,
                target=target,
                limit=limit,
                linearisation=k,
                guard=self.guard,
                start=Start(
                    self.got.logits[self.removed_rows], self.guard.among(self.got).accuracy
                ),
                passes=self.passes,
            )
            self.history += tried
            self.left = next(r.self_accuracy for r in tried if r.step == self.step)
            if unit is None:
                unit = self.step * length
                if parts > 1 and self.step > 0 and self.reached:
                    self.step, self.reached, unit = self.step / parts, False, unit / parts
            current = apply_update(current, direction.delta, self.step)
            self.norms.append(self.step * length)
            self.clock.lap("step")
            if self.reached or parts == 1 or self.step == 0:
                break
        return current

    def along_one_direction(
        self, test: Dataset[Any], step_norm: float | None, max_steps: int
    ) -> nn.Module:
        """The paper's protocol; returns the edited copy."""
        n = len(self.got.labels)
        self.theory_step = len(self.removed_rows) / n
        subset: Any = self.sampler
        if subset is None:
            m = min(self.samples, n)
            subset = CurvatureSampler(self.got.logits, m, method="systematic", seed=self.seed)
        elif not hasattr(subset, "indices"):
            raise TypeError(
                "remove_class: protocol='paper' takes one sampler with .indices and .weights, got "
                f"a {type(subset).__name__}"
            )
        self.clock.lap("sample")
        direction = self._solve(self.model, subset, None)
        norm = float(flat_parameters(self.model).double().norm())
        length = norm / 200 if step_norm is None else step_norm
        self.step, self.history = best_on_test(
            self.model,
            direction.delta,
            test,
            self.class_index,
            unit=length / float(direction.delta.norm()),
            max_steps=max_steps,
            passes=self.passes,
            progress=self.progress,
        )
        edited = apply_update(self.model, direction.delta, self.step)
        self.norms = [self.step * float(direction.delta.norm())]
        self.clock.lap("step")
        return edited

    def _direction(self, current: nn.Module, k: int) -> InfluenceResult:
        subset = curvature_subset(
            self.sampler,
            self.got.logits,
            self.got.labels,
            self.kept_rows,
            samples=self.samples,
            step=k,
            seed=self.seed,
        )
        stand_ins = None
        if self.removed_samples is not None and self.removed_samples < len(self.removed_rows):
            stand_ins = ResidualSampler(
                self.got.logits[self.removed_rows],
                self.got.labels[self.removed_rows],
                self.removed_samples,
                seed=self.seed + k,
            )
        self.clock.lap("sample")
        return self._solve(current, subset, stand_ins)

    def _solve(
        self, current: nn.Module, subset: SubsetSampler, stand_ins: SubsetSampler | None
    ) -> InfluenceResult:
        direction = influence(
            current,
            self.loss_fn,
            self.removed,
            self.train,
            sampler=subset,
            removed_sampler=stand_ins,
            passes=self.passes,
            progress=self.progress,
            **self.solve,
        )
        self.directions.append(direction)
        self.clock.lap("solve")
        return direction
