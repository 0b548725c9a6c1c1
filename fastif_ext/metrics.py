"""How a model stands towards one class of a data set: the measures of class removal."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.data import Dataset

from fastif_ext.data import Rows, loader, map_style
from fastif_ext.passes import HERE, Passes


class ClassMetrics(NamedTuple):
    """How a model stands towards one class of a data set."""

    f1: float
    """2 (1-s) t / ((1-s) + t), s = self_accuracy, t = remaining_accuracy; 1 is perfect removal."""
    self_accuracy: float
    """Accuracy on the rows of the class: should fall to 0."""
    remaining_accuracy: float
    """Accuracy on all other rows: should stay."""
    self_loss: float
    """Mean cross-entropy, in nats, on the rows of the class: should rise."""


def f1_score(self_accuracy: float, remaining_accuracy: float) -> float:
    """F1 of class removal, 2 (1-s) t / ((1-s) + t), the harmonic mean of forgetting and keeping.

    Args:
        self_accuracy: s, accuracy on the removed class, in [0, 1].
        remaining_accuracy: t, accuracy on the other classes, in [0, 1].

    Returns:
        A number in [0, 1]; 0 where nothing is forgotten or nothing is kept.

    Example:
        >>> import fastif_ext as fi
        >>> fi.f1_score(0.0, 1.0), fi.f1_score(1.0, 1.0)
        (1.0, 0.0)
    """
    for name, value in (
        ("self_accuracy", self_accuracy),
        ("remaining_accuracy", remaining_accuracy),
    ):
        if not 0 <= value <= 1:
            raise ValueError(f"f1_score: {name} must be between 0 and 1, got {value}")
    forgotten = 1 - self_accuracy
    total = forgotten + remaining_accuracy
    return 2 * forgotten * remaining_accuracy / total if total > 0 else 0.0


def class_metrics(
    model: nn.Module, data: Rows, class_index: int, *, passes: Passes = HERE
) -> ClassMetrics:
    """Self-accuracy, remaining accuracy, self-loss and F1 of a model on a data set.

    Args:
        model: maps inputs to logits [b, Y].
        data: a map-style dataset of (inputs, label), or (inputs, labels).
        class_index: the class that is to be forgotten.
        passes: who makes the pass over the data; see fastif_ext.distributed.SharedPasses.

    Returns:
        ClassMetrics(f1, self_accuracy, remaining_accuracy, self_loss).

    Raises:
        ValueError: the data set has no row of the class, or no other row.

    Example:
        >>> import torch, fastif_ext as fi
        >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
        >>> fi.class_metrics(torch.nn.Identity(), data, 1).self_accuracy
        1.0
    """
    data = map_style("class_metrics: data", data)
    return standing(predict(model, data, passes=passes), class_index)


def standing(got: Predictions, class_index: int) -> ClassMetrics:
    """class_metrics of predictions that are there already."""
    own = got.labels == class_index
    if not own.any() or own.all():
        which = "no row" if not own.any() else "nothing but rows"
        raise ValueError(
            f"class_metrics: data has {which} of class {class_index}; its labels are "
            f"{got.labels.unique().tolist()}"
        )
    hit = (got.logits.argmax(1) == got.labels).double()
    s, t = float(hit[own].mean()), float(hit[~own].mean())
    loss = nn.functional.cross_entropy(got.logits[own].double(), got.labels[own])
    return ClassMetrics(f1_score(s, t), s, t, float(loss))


class Fit(NamedTuple):
    """How logits go with labels."""

    accuracy: float
    loss: float
    """Mean cross-entropy, in nats."""


def fit(logits: Tensor, labels: Tensor) -> Fit:
    """Accuracy and mean cross-entropy of logits [n, Y] towards labels [n]; NaN for no rows."""
    hit = (logits.argmax(1) == labels).double().mean()
    return Fit(float(hit), float(nn.functional.cross_entropy(logits.double(), labels)))


class Predictions(NamedTuple):
    """Logits [n, Y] and labels [n] of a whole data set, in its order."""

    logits: Tensor
    labels: Tensor


def predict(
    model: nn.Module, data: Dataset[Any], *, progress: bool = False, passes: Passes = HERE
) -> Predictions:
    """Logits and labels of a whole data set, in its order."""
    got = passes.extract(model, loader(data), progress=progress)
    if got.labels is None:
        raise ValueError(
            "class removal needs a dataset of (inputs, label); this one has no labels (real "
            "numbers are no classes)"
        )
    if got.labels.dim() != 1:
        raise ValueError(
            f"labels must be whole numbers, one for each row, got {got.labels.dtype} of shape "
            f"{list(got.labels.shape)}; use labels.argmax(1) of one-hot labels"
        )
    return Predictions(got.logits, got.labels)
