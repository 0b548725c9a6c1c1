"""How far to go along a direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from fastif_ext.data import take
from fastif_ext.metrics import Fit, class_metrics, f1_score, fit, predict
from fastif_ext.parameters import apply_update
from fastif_ext.passes import HERE, Passes
from fastif_ext.removal.report import KEEP, StepRecord

WATCHED = 1000  # the standard error of an accuracy on so many rows is below .016


class Guard:
    """Watches what a model knows of the rows that stay.

    Args:
        model: as it was before anything was removed.
        train: the training set, a map-style dataset of (inputs, label).
        kept: int64, its rows that stay; at most WATCHED, evenly spread over them, are looked at.
        passes: who makes the passes over them.
    """

    def __init__(
        self, model: nn.Module, train: Dataset[Any], kept: Tensor, *, passes: Passes = HERE
    ) -> None:
        if len(kept) > WATCHED:
            kept = kept[torch.linspace(0, len(kept) - 1, WATCHED, dtype=torch.float64).long()]
        self.rows, self._passes = take(train, kept), passes
        self.before = self.of(model)
        self.floor = KEEP * self.before.accuracy
        """Accuracy below which a model is broken."""

    def of(self, model: nn.Module) -> Fit:
        """Accuracy and loss of a model on the rows that are watched."""
        return fit(*predict(model, self.rows, passes=self._passes))


def shortest_step(
    model: nn.Module,
    delta: Tensor,
    removed: Dataset[Any],
    class_index: int,
    *,
    first: float,
    target: float = 0.01,
    limit: float | None = None,
    linearisation: int = 0,
    guard: Guard | None = None,
    passes: Passes = HERE,
) -> tuple[float, list[StepRecord], bool]:
    """The shortest step along delta after which the model no longer knows the class.

    The step is doubled until self-accuracy on the removed rows is below the target, then the
    bracket is halved to 2 %. The direction is a linearisation: past its range self-accuracy may
    rise again, and far outside everything is wrong, the class too. So a step that breaks the model,
    by its guard, is never taken; it bounds the search from above. Self-accuracy on rows that were
    not trained on is a little higher, so the shortest step is short of retraining: with a limit and
    a guard a longer one is taken if its F1 on training rows is better.

    Args:
        model: left unchanged.
        delta: the direction, [p] over all trainable parameters.
        removed: the rows of the class, a map-style dataset.
        class_index: the class.
        first: the first step tried.
        target: self-accuracy to go below.
        limit: the longest step to take; it is taken where the target needs a longer one.
        linearisation: noted in the records.
        guard: tells which steps break the model; without one no step is refused.
        passes: who makes the passes over `removed`.

    Returns:
        (step, every step tried, whether the target was reached); step 0 where the model does not
        know the class in the first place. Where the target is not reached, by 2^20 times the first
        step or before the model breaks, the step with the best F1 on training rows among those
        tried that do not break it; without a guard that with the least self-accuracy.
    """
    history: list[StepRecord] = []

    def knows(step: float) -> bool:
        """Whether the model still knows the class after a step."""
        moved = apply_update(model, delta, step)
        logits = predict(moved, removed, passes=passes).logits
        own = float((logits.argmax(1) == class_index).double().mean())
        others = None if guard is None else guard.of(moved).accuracy
        history.append(StepRecord(step, own, None, linearisation, others))
        return own >= target or not logits.isfinite().all()

    def breaks(record: StepRecord) -> bool:
        return guard is not None and (record.kept_accuracy or 0.0) < guard.floor

    if not knows(0.0):  # the class is forgotten already
        return 0.0, history, True
    low, high, top = 0.0, None, None  # the longest too short, the shortest good, one that breaks
    step = first if limit is None else limit
    while high is None:
        known, broken = knows(step), breaks(history[-1])
        if broken:
            top = step
        elif not known:
            high = step
        elif limit is not None and top is None:
            return limit, history, False
        else:
            low = step
        narrow = top is not None and top - low <= 0.02 * top
        endless = (top is None or low == 0) and len(history) > 20
        if high is None and (narrow or endless):
            sound = [record for record in history if not breaks(record)] or history[:1]
            return max(sound, key=_training_f1).step, history, False
        step = 2 * low if top is None else (low + top) / 2
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        short = knows(middle) or breaks(history[-1])
        low, high = (middle, high) if short else (low, middle)
    if limit is not None and guard is not None:
        good = [r for r in history if r.self_accuracy < target and not breaks(r)]
        high = max(good, key=_training_f1).step  # of equals the first, which is the longest
    return high, history, True


def _training_f1(record: StepRecord) -> float:
    kept = 1.0 if record.kept_accuracy is None else record.kept_accuracy
    return f1_score(record.self_accuracy, kept)


def best_on_test(
    model: nn.Module,
    delta: Tensor,
    test: Dataset[Any],
    class_index: int,
    *,
    unit: float,
    max_steps: int,
    passes: Passes,
    progress: bool,
) -> tuple[float, list[StepRecord]]:
    """Step 1, 2, 3 ... units along the direction; the step with the best F1 on the test set."""
    history = []
    for i in tqdm(range(1, max_steps + 1), desc="steps", disable=not progress):
        moved = apply_update(model, delta, i * unit)
        metrics = class_metrics(moved, test, class_index, passes=passes)
        history.append(StepRecord(i * unit, metrics.self_accuracy, metrics.f1))
    best = max(history, key=lambda record: record.f1 or 0.0)
    return best.step, history
