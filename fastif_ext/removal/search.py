"""How far to go along a direction."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from fastif_ext.metrics import class_metrics, predict
from fastif_ext.parameters import apply_update
from fastif_ext.removal.report import StepRecord


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
        limit: the longest step to take; it is taken where the target needs a longer one.
        linearisation: noted in the records.

    Returns:
        (step, every step tried, whether the target was reached); step 0 where the model does not
        know the class in the first place. Where the target is not reached within 2^20 times
        the first step, a warning says so and the step with the least self-accuracy is returned.
    """
    history: list[StepRecord] = []

    def below(step: float) -> bool:
        logits = predict(apply_update(model, delta, step), removed).logits
        accuracy = float((logits.argmax(1) == class_index).double().mean())
        history.append(StepRecord(step, accuracy, None, linearisation))
        return accuracy < target and bool(logits.isfinite().all())

    if below(0.0):  # the class is forgotten already
        return 0.0, history, True
    low, high = 0.0, first if limit is None else limit
    while not below(high):
        if limit is not None:
            return limit, history, False
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


def best_on_test(
    model: nn.Module,
    delta: Tensor,
    test: Dataset[Any],
    class_index: int,
    *,
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
