"""How far to go along a direction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from fastif_ext.data import take
from fastif_ext.metrics import Fit, Predictions, class_metrics, f1_score, fit, predict
from fastif_ext.parameters import apply_update
from fastif_ext.passes import HERE, Passes
from fastif_ext.removal.report import KEEP, StepRecord

WATCHED = 1000  # the standard error of an accuracy on so many rows is below .016
SLACK = 1.1  # how much longer than its share the last part of the way may be
LOOKS = 20


class Guard:
    """Watches what a model knows of the rows that stay.

    Args:
        model: as it was before anything was removed.
        train: the training set, a map-style dataset of (inputs, label).
        kept: int64, its rows that stay; at most WATCHED, evenly spread over them, are looked at.
        got: the model's predictions for all of `train`, where they are there already.
        passes: who makes the passes over them.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Dataset[Any],
        kept: Tensor,
        *,
        got: Predictions | None = None,
        passes: Passes = HERE,
    ) -> None:
        if len(kept) > WATCHED:
            kept = kept[torch.linspace(0, len(kept) - 1, WATCHED, dtype=torch.float64).long()]
        self.rows, self._kept, self._passes = take(train, kept), kept, passes
        self.before = self.of(model) if got is None else self.among(got)
        self.floor = KEEP * self.before.accuracy
        """Accuracy below which a model is broken."""

    def of(self, model: nn.Module) -> Fit:
        """Accuracy and loss of a model on the rows that are watched."""
        return fit(*predict(model, self.rows, passes=self._passes))

    def among(self, got: Predictions) -> Fit:
        """The same from a model's predictions for the whole training set."""
        return fit(got.logits[self._kept], got.labels[self._kept])


class Start(NamedTuple):
    """What is known of the model that a search starts from."""

    logits: Tensor
    """Of the rows of the class, [n_c, Y]."""
    kept_accuracy: float | None
    """As the guard has it."""


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
    start: Start | None = None,
    passes: Passes = HERE,
) -> tuple[float, list[StepRecord], bool]:
    """The shortest step along delta after which the model no longer knows the class.

    The step is lengthened until self-accuracy on the removed rows is below the target, then the
    bracket is narrowed to 2 %. Where to look next is where the rows' logits, on a line through two
    steps that were looked at, leave the class: a handful of looks, as logits are nearly linear in
    the step. The direction is a linearisation: past its range self-accuracy may rise again, and far
    outside everything is wrong, the class too. So a step that breaks the model, by its guard, is
    never taken; it bounds the search from above. Self-accuracy on rows that were not trained on is
    a little higher, so the shortest step is short of retraining: with a limit and a guard a longer
    one is taken if its F1 on training rows is better.

    Args:
        model: left unchanged.
        delta: the direction, [p] over all trainable parameters.
        removed: the rows of the class, a map-style dataset.
        class_index: the class.
        first: the first step tried.
        target: self-accuracy to go below.
        limit: about the longest step to take; it is taken where the target needs one that is more
            than SLACK times as long.
        linearisation: noted in the records.
        guard: tells which steps break the model; without one no step is refused.
        start: what is known of the model itself; by default it is looked at as step 0.
        passes: who makes the passes over `removed`.

    Returns:
        (step, every step looked at, whether the target was reached); step 0 where the model does
        not know the class in the first place. Where the target is not reached, after LOOKS looks or
        before the model breaks, the step with the best F1 on training rows among those looked at
        that do not break it; without a guard that with the least self-accuracy.
    """
    line = _Line(model, delta, removed, class_index, target, linearisation, guard, passes)
    low = line.look(0.0, start)  # the longest that is too short
    if not low.knows:  # the class is forgotten already
        return 0.0, line.history, True
    high, top = None, None  # the shortest that is good, the shortest that breaks the model
    step = first if limit is None else limit
    while high is None:
        at = line.look(step)
        if at.breaks:
            top = step
        elif not at.knows:
            high = at
            break
        aim, low = (2 * step, low) if at.breaks else (1.01 * line.forgotten_at(low, at), at)
        if limit is not None and top is None and not aim <= SLACK * limit:
            return step, line.history, False
        narrow = top is not None and top - low.step <= 0.02 * top
        endless = (top is None or low.step == 0) and len(line.looks) > LOOKS
        if narrow or endless:
            sound = [look for look in line.looks if not look.breaks] or line.looks[:1]
            return max(sound, key=_f1).step, line.history, False
        # at most twice as far: logits are not linear for ever; and no creeping
        least = 1.02 if len(line.looks) < 8 else 2.0
        step = min(max(aim, least * step), 2 * step) if top is None else (low.step + top) / 2
    may_be_longer = limit is not None and guard is not None
    if may_be_longer and _f1(high) >= _f1(high, kept=low.kept):
        return high.step, line.history, True  # costs the others nothing: a shorter gains nothing
    widths = math.inf, math.inf
    while high.step - low.step > 0.02 * high.step:
        aim = line.forgotten_at(low, high)
        # past it, for a step that is good, then before it, for one that is too short
        step = 1.009 * aim if high.step > 1.018 * aim else 0.991 * aim
        slow = high.step - low.step > widths[0] / 2
        widths = widths[1], high.step - low.step
        if slow or not low.step < step < high.step:
            step = (low.step + high.step) / 2
        at = line.look(step)
        low, high = (at, high) if at.knows or at.breaks else (low, at)
    if may_be_longer:
        good = [look for look in line.looks if not look.knows and not look.breaks]
        high = max(good, key=_f1)  # of equals the first, which is the longest
    return high.step, line.history, True


class _Look(NamedTuple):
    """What was found after a step."""

    step: float
    logits: Tensor
    """Of the rows of the class."""
    own: float
    """Self-accuracy."""
    kept: float | None
    """Accuracy on the rows that the guard watches."""
    knows: bool
    """Whether the model still knows the class."""
    breaks: bool
    """Whether it knows too little else."""


@dataclass
class _Line:
    """A model along a direction, looked at step by step; arguments as of shortest_step."""

    model: nn.Module
    delta: Tensor
    removed: Dataset[Any]
    class_index: int
    target: float
    linearisation: int
    guard: Guard | None
    passes: Passes
    looks: list[_Look] = field(default_factory=list)

    def look(self, step: float, known: Start | None = None) -> _Look:
        """After a step; `known` is what is known of it already."""
        if known is None:
            moved = apply_update(self.model, self.delta, step)
            logits = predict(moved, self.removed, passes=self.passes).logits
            known = Start(logits, None if self.guard is None else self.guard.of(moved).accuracy)
        logits, kept = known
        own = float((logits.argmax(1) == self.class_index).double().mean())
        knows = own >= self.target or not bool(logits.isfinite().all())
        breaks = self.guard is not None and (kept or 0.0) < self.guard.floor
        self.looks.append(_Look(step, logits, own, kept, knows, breaks))
        return self.looks[-1]

    def forgotten_at(self, a: _Look, b: _Look) -> float:
        """The step that meets the target if logits go on along the line through two steps."""
        leaves = _leaves(a.logits, b.logits, self.class_index)
        too_many = max(1, math.ceil(self.target * len(leaves)))
        return a.step + (b.step - a.step) * float(leaves.topk(too_many).values[-1])

    @property
    def history(self) -> list[StepRecord]:
        """Of all looks."""
        return [StepRecord(at.step, at.own, None, self.linearisation, at.kept) for at in self.looks]


def _leaves(a: Tensor, b: Tensor, class_index: int) -> Tensor:
    """Where each row leaves its class, float32 [n], if logits go on from a (at 0) through b (at 1).

    0 for a row that is not in the class at a, infinity for one that stays.
    """
    others = torch.arange(a.shape[1], device=a.device) != class_index
    lead, later = (x.float()[:, class_index, None] - x.float()[:, others] for x in (a, b))
    fall = lead - later
    at = torch.where(fall > 0, lead / fall, math.inf).nan_to_num(math.inf, math.inf).amin(1)
    return torch.where((lead > 0).all(1), at, 0.0)


def _f1(look: _Look, kept: float | None = None) -> float:
    """On training rows."""
    kept = look.kept if kept is None else kept
    return f1_score(look.own, 1.0 if kept is None else kept)


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
