"""Compare samplers in class removal: the grid behind `fastif-ext demo` and the experiments.

For each sampler, subset size and seed: draw a subset, solve for the influence of a class on it,
remove the class, and measure what came of it next to the exact influence, plain gradient ascent
and retraining.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastif_ext.curvature import Hessian
from fastif_ext.extract import Extracted
from fastif_ext.removal import class_metrics
from fastif_ext.samplers import (
    CurvatureSampler,
    FeatureSampler,
    LogitSampler,
    RandomSampler,
    StratifiedSampler,
    SubsetSampler,
)

SAMPLERS = (
    "random",
    "stratified",
    "logit",
    "feature-nearest",
    "feature-distance",
    "curvature",
    "curvature-systematic",
)


@dataclass(frozen=True)
class Record:
    """One removal: a sampler at one subset size with one seed, or a method without a subset."""

    method: str
    m: int | None
    seed: int | None
    f1: float | None
    self_accuracy: float | None
    remaining_accuracy: float | None
    self_loss: float | None
    hvp_error: float | None = None
    """|H_S v - H v| / |H v|, v standard normal."""
    ihvp_error: float | None = None
    """|x_S - x| / |x|, x = (H + damping I)^-1 g on all rows."""
    iterations: int | None = None
    converged: bool | None = None
    sample_seconds: float | None = None
    solve_seconds: float | None = None
    peak_megabytes: float | None = None
    """Peak resident memory above the start of the removal, where the system tells it."""
    failure: str | None = None
    """Why there is no result: the solver's own words."""


def make_sampler(name: str, data: Extracted, m: int, *, seed: int) -> SubsetSampler:
    """A sampler by its name in SAMPLERS, of about m rows.

    The logit sampler draws m // Y rows for each of the Y classes; the feature samplers use Y
    clusters, as in the paper.

    Args:
        name: one of SAMPLERS.
        data: logits, features and labels of the training set, from fastif_ext.extract.
        m: subset size.
        seed: the same seed draws the same rows.

    Returns:
        The sampler.

    Raises:
        ValueError: an unknown name, or labels or features that the sampler needs are missing.
    """
    logits, classes = data.logits, data.logits.shape[1]
    if name == "random":
        return RandomSampler(len(logits), m, seed=seed)
    if name == "stratified":
        if data.labels is None:
            raise ValueError("make_sampler: 'stratified' needs labels, and data has none")
        return StratifiedSampler(data.labels, m, seed=seed)
    if name == "logit":
        if m < classes:
            raise ValueError(f"make_sampler: 'logit' needs m >= {classes} classes, got {m}")
        return LogitSampler(logits, m // classes, seed=seed)
    if name in ("feature-nearest", "feature-distance"):
        if data.features is None:
            raise ValueError(f"make_sampler: {name!r} needs features: extract(..., layer=...)")
        mode = name.removeprefix("feature-")
        return FeatureSampler(data.features, m, n_clusters=classes, mode=mode, seed=seed)
    if name == "curvature":
        return CurvatureSampler(logits, m, seed=seed)
    if name == "curvature-systematic":
        return CurvatureSampler(logits, m, method="systematic", seed=seed)
    raise ValueError(f"make_sampler: name must be one of {', '.join(SAMPLERS)}; got {name!r}")


@dataclass(frozen=True)
class Setting:
    """One trained model and the class to remove from it."""

    model: nn.Module
    train: TensorDataset
    test: TensorDataset
    class_index: int
    damping: float
    loss_fn: Callable[[Any, Tensor], Tensor] = nn.functional.cross_entropy
    solver: str = "lissa"
    tol: float = 1e-3
    max_iter: int = 5000


class Comparison:
    """Runs removals in one setting, next to the exact influence on all rows."""

    def __init__(self, setting: Setting, data: Extracted) -> None:
        """Args: the setting, and the logits, features and labels of its training set."""
        self.setting, self.data = setting, data
        self.full = Hessian(setting.model, setting.loss_fn, setting.train)
        generator = torch.Generator().manual_seed(0)
        self.probe = torch.randn(self.full.dim, generator=generator, dtype=self.full.dtype)
        self.full_product = self.full @ self.probe
        self.exact_delta: Tensor | None = None

    def exact(self) -> Record:
        """The influence with the Hessian of all training rows."""
        return self._remove("exact IF", None, None, None, 0.0)

    def subset(self, sampler: str, m: int, seed: int) -> Record:
        """The influence with the Hessian of one sampled subset; run `exact` first."""
        start = time.perf_counter()
        chosen = make_sampler(sampler, self.data, m, seed=seed)
        return self._remove(sampler, m, seed, chosen, time.perf_counter() - start)

    def gradient_only(self) -> Record:
        """Plain gradient ascent on the class: the direction g in place of (H + damping)^-1 g."""
        return self._remove("gradient only", None, None, None, 0.0, gradient=True)

    def retrained(self, model: nn.Module, seconds: float) -> Record:
        """A model that was trained without the class."""
        metrics = class_metrics(model, self.setting.test, self.setting.class_index)
        return Record("retraining", None, None, **metrics._asdict(), solve_seconds=seconds)

    def _remove(
        self,
        method: str,
        m: int | None,
        seed: int | None,
        sampler: SubsetSampler | None,
        sample_seconds: float,
    ) -> Record:
        raise NotImplementedError
