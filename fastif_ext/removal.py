"""Class removal: make a trained model forget one class without retraining it.

The update is ``theta' = theta + step * x`` with ``x = (H_S + damping I)^-1 g``, g the mean gradient
over the class's training rows and H_S the curvature of the subset. First-order theory says
``step = n_c / n``; useful steps are ten to fifty times longer, so the step has to be chosen.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from fastif_ext.data import take
from fastif_ext.influence import InfluenceResult, influence
from fastif_ext.metrics import ClassMetrics, class_metrics, predict
from fastif_ext.parameters import apply_update
from fastif_ext.samplers import CurvatureSampler, SubsetSampler


class StepRecord(NamedTuple):
    """One step that the search tried."""

    step: float
    self_accuracy: float
    """On the training rows of the class (default protocol) or on the test set (paper's)."""
    f1: float | None
    """On the test set; None in the default protocol, which does not look at it."""


@dataclass
class RemovalReport:
    """What remove_class returns."""

    model: nn.Module
    """A copy of the model with the class removed; the original is unchanged."""
    class_index: int
    protocol: str
    """"default" (step chosen on training rows of the class) or "paper" (on the test set)."""
    before: ClassMetrics
    after: ClassMetrics
    """Both on `test`, or on `train` where no test set was given."""
    step: float
    """theta' = theta + step * influence.delta."""
    theory_step: float
    """n_c / n."""
    target_reached: bool
    """Whether self-accuracy fell below the target (always true in the paper's protocol)."""
    history: list[StepRecord]
    influence: InfluenceResult
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of "sample", "solve" and "step"."""

    @property
    def f1(self) -> float:
        """F1 of the removal, after."""
        return self.after.f1

    @property
    def self_accuracy(self) -> float:
        """Accuracy on the removed class, after."""
        return self.after.self_accuracy

    @property
    def remaining_accuracy(self) -> float:
        """Accuracy on the other classes, after."""
        return self.after.remaining_accuracy

    @property
    def self_loss(self) -> float:
        """Mean cross-entropy on the removed class, after."""
        return self.after.self_loss

    @property
    def steps(self) -> int:
        """How many steps the search tried."""
        return len(self.history)

    @property
    def delta_norm(self) -> float:
        """|theta' - theta|."""
        return abs(self.step) * float(self.influence.delta.norm())

    def to_dict(self) -> dict[str, Any]:
        """The figures of the report, as plain numbers."""
        solve = self.influence.solve
        return {
            "class_index": self.class_index,
            "protocol": self.protocol,
            "before": self.before._asdict(),
            "after": self.after._asdict(),
            "step": self.step,
            "theory_step": self.theory_step,
            "delta_norm": self.delta_norm,
            "target_reached": self.target_reached,
            "damping": solve.damping,
            "iterations": solve.iterations,
            "converged": solve.converged,
            "residual": float(solve.residual),
            "seconds": self.seconds,
            "history": [record._asdict() for record in self.history],
        }

    def summary(self) -> str:
        """The report in a few lines."""
        b, a, solve = self.before, self.after, self.influence.solve
        chosen = "training rows of the class" if self.protocol == "default" else "the TEST set"
        lines = [
            f"  F1                  {b.f1:8.4f} -> {a.f1:.4f}",
            f"  self-accuracy       {b.self_accuracy:8.4f} -> {a.self_accuracy:.4f}",
            f"  remaining accuracy  {b.remaining_accuracy:8.4f} -> {a.remaining_accuracy:.4f}",
            f"  self-loss           {b.self_loss:8.4f} -> {a.self_loss:.4f}",
            f"  step {self.step:.3g} = {self.step / self.theory_step:.1f} x n_c/n, chosen on "
            f"{chosen} in {self.steps} tries; |change| = {self.delta_norm:.3g}",
            f"  solve: {solve.iterations} iterations, residual {float(solve.residual):.1e}, "
            f"damping {solve.damping:.3g}",
            "  seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items()),
        ]
        if not self.target_reached:
            lines.append("  the target self-accuracy was NOT reached")
        return "\n".join(lines)


def remove_class(
    model: nn.Module,
    train: Dataset[Any],
    class_index: int,
    *,
    test: Dataset[Any] | None = None,
    sampler: SubsetSampler | None = None,
    protocol: str = "default",
    loss_fn: Callable[[Any, Tensor], Tensor] = nn.functional.cross_entropy,
    target: float = 0.01,
    step_norm: float | None = None,
    max_steps: int = 100,
    progress: bool = False,
    **solve: Any,
) -> RemovalReport:
    """Remove a class from a trained model by an influence-function update.

    ``protocol="default"`` solves for one direction and takes the shortest step along it with which
    accuracy on the class's own *training* rows is below `target`; the test set is only reported.
    ``protocol="paper"`` is the predecessor's procedure (arXiv 2312.05586): add the normalised
    direction again and again and keep the best F1 *on the test set*. That selects on the test set,
    so its F1 is optimistic; use it to compare with published figures.

    Args:
        model: maps inputs to logits; it is copied, never changed.
        train: the training set, a map-style dataset of (inputs, label).
        class_index: the class to remove.
        test: where the report is measured; by default `train`. Required for protocol="paper".
        sampler: the subset for the Hessian, its indices being rows of `train`; by default a
            systematic CurvatureSampler of at most 400 rows.
        protocol: "default" or "paper".
        loss_fn: loss_fn(outputs, labels) -> mean loss, the one the model was trained with.
        target: self-accuracy that the default protocol goes below.
        step_norm: length of one step of protocol="paper"; by default |theta| / 200.
        max_steps: most steps that protocol="paper" adds.
        progress: show progress bars.
        **solve: passed on to fastif_ext.influence: params, solver, damping, tol, max_iter ...

    Returns:
        RemovalReport, with the new model as ``.model``.

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
    clock = _Clock()
    got = predict(model, train, progress=progress)
    removed_rows = (got.labels == class_index).nonzero().flatten()
    n, n_removed = len(got.labels), len(removed_rows)
    if not 0 < n_removed < n:
        raise ValueError(
            f"remove_class: class_index = {class_index} has {n_removed} of {n} training rows; the "
            f"labels are {got.labels.unique().tolist()}"
        )
    if sampler is None:
        sampler = CurvatureSampler(got.logits, min(400, n), method="systematic", seed=0)
    clock.lap("sample")

    removed = take(train, removed_rows)
    result = influence(model, loss_fn, removed, train, sampler=sampler, progress=progress, **solve)
    clock.lap("solve")

    theory_step = n_removed / n
    if protocol == "paper":
        assert test is not None
        norm = float(sum(p.detach().double().square().sum() for p in model.parameters()) ** 0.5)
        length = norm / 200 if step_norm is None else step_norm
        unit = length / float(result.delta.norm())
        step, history = _best_on_test(
            model, result.delta, test, class_index, unit, max_steps, progress
        )
        reached = True
    else:
        step, history, reached = shortest_step(
            model, result.delta, removed, class_index, first=theory_step, target=target
        )
    clock.lap("step")

    edited = apply_update(model, result.delta, step)
    report_on = train if test is None else test
    return RemovalReport(
        model=edited,
        class_index=class_index,
        protocol=protocol,
        before=class_metrics(model, report_on, class_index),
        after=class_metrics(edited, report_on, class_index),
        step=step,
        theory_step=theory_step,
        target_reached=reached,
        history=history,
        influence=result,
        seconds=clock.laps,
    )


def shortest_step(
    model: nn.Module,
    delta: Tensor,
    removed: Dataset[Any],
    class_index: int,
    *,
    first: float,
    target: float = 0.01,
) -> tuple[float, list[StepRecord], bool]:
    """The shortest step along delta after which the model no longer knows the class.

    The step is doubled until self-accuracy on the removed rows is below the target, then the
    bracket is halved to 2 %. Only these rows are looked at.

    Args:
        model: left unchanged.
        delta: the direction, [p] over all trainable parameters.
        removed: the rows of the class, a map-style dataset.
        class_index: the class.
        first: the first step tried.
        target: self-accuracy to go below.

    Returns:
        (step, every step tried, whether the target was reached); step 0 where the model does not
        know the class in the first place. Where the target is not reached within 2^20 times
        the first step, a warning says so and the step with the least self-accuracy is returned.
    """
    history: list[StepRecord] = []

    def below(step: float) -> bool:
        logits = predict(apply_update(model, delta, step), removed).logits
        accuracy = float((logits.argmax(1) == class_index).double().mean())
        history.append(StepRecord(step, accuracy, None))
        return accuracy < target and bool(logits.isfinite().all())

    if below(0.0):  # the class is forgotten already
        return 0.0, history, True
    low, high = 0.0, first
    while not below(high):
        low, high = high, 2 * high
        if len(history) > 20:
            best = min(history, key=lambda record: record.self_accuracy)
            warnings.warn(
                f"self-accuracy on the training rows of class {class_index} stayed at "
                f"{best.self_accuracy:.3f} or above for steps up to {high:.3g}, target {target}; "
                f"the direction may be poor: try more samples, larger damping or a smaller tol",
                stacklevel=3,
            )
            return best.step, history, False
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if below(middle) else (middle, high)
    return high, history, True


def _best_on_test(
    model: nn.Module,
    delta: Tensor,
    test: Dataset[Any],
    class_index: int,
    unit: float,
    max_steps: int,
    progress: bool,
) -> tuple[float, list[StepRecord]]:
    """Step 1, 2, 3 ... units along the direction; the step with the best F1 on the test set."""
    history = []
    for i in tqdm(range(1, max_steps + 1), desc="steps", disable=not progress):
        metrics = class_metrics(apply_update(model, delta, i * unit), test, class_index)
        history.append(StepRecord(i * unit, metrics.self_accuracy, metrics.f1))
    best = max(history, key=lambda record: record.f1 or 0.0)
    return best.step, history


class _Clock:
    """Wall time of consecutive stages."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
