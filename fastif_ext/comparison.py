"""Compare samplers in class removal: the grid behind `fastif-ext demo` and the experiments.

For each sampler, subset size and seed: draw a subset, solve for the influence of a class on it,
remove the class, and measure what came of it next to the exact influence, plain gradient ascent
and retraining.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastif_ext.conjugate_gradients import cg
from fastif_ext.curvature import make_curvature
from fastif_ext.data import take
from fastif_ext.extract import Extracted
from fastif_ext.metrics import class_metrics
from fastif_ext.objective import mean_gradient
from fastif_ext.parameters import Params, Selection, apply_update
from fastif_ext.removal import Guard, remove_class, shortest_step
from fastif_ext.samplers import (
    AllRows,
    CurvatureSampler,
    FeatureSampler,
    LogitSampler,
    RandomSampler,
    StratifiedSampler,
    SubsetSampler,
)
from fastif_ext.spectrum import SolverDivergence, spectrum

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
    f1: float | None = None
    self_accuracy: float | None = None
    remaining_accuracy: float | None = None
    self_loss: float | None = None
    hvp_error: float | None = None
    """|H_S v - H v| / |H v|, v standard normal."""
    ihvp_error: float | None = None
    """|x_S - x| / |x|, x = (H + d I)^-1 g on all rows, d = Comparison.common_damping."""
    damping: float | None = None
    iterations: int | None = None
    converged: bool | None = None
    target_reached: bool | None = None
    """Whether self-accuracy on the training rows fell below the target."""
    sample_seconds: float | None = None
    solve_seconds: float | None = None
    peak_megabytes: float | None = None
    """Peak memory of the removal on the model's device, as in RemovalReport, where it is told."""
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
    """One trained model, the class to remove from it, and how influence is solved for."""

    model: nn.Module
    train: TensorDataset
    test: TensorDataset
    class_index: int
    loss_fn: Callable[[Any, Tensor], Tensor] = nn.functional.cross_entropy
    damping: float | str = "auto"
    solver: str = "lissa"
    tol: float = 1e-3
    params: Params = None
    curvature: str = "hessian"
    linearisations: int = 1
    """Parts of the way, as in remove_class; 1 is one direction, which the sampler decides."""


class Comparison:
    """Removes the class with one sampled subset after the other, and with what they approximate.

    Args:
        setting: the model, the data and the solver.
        data: logits, features and labels of the training set, from fastif_ext.extract.
    """

    def __init__(self, setting: Setting, data: Extracted) -> None:
        self.setting, self.data = setting, data
        full = self._operator(setting.train, None)
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(full.dim, generator=generator, dtype=torch.float64)
        self._probe = probe.to(full.device, full.dtype)
        self._full_product = full @ self._probe
        # An automatic damping differs from subset to subset; errors are compared at one for all.
        self.common_damping = 0.1 * spectrum(full, self._probe).largest
        if data.labels is None:
            raise ValueError("Comparison: data has no labels")
        own = data.labels == setting.class_index
        self._removed_rows, kept = own.nonzero().flatten(), (~own).nonzero().flatten()
        self._guard = Guard(setting.model, setting.train, kept)
        removed = take(setting.train, self._removed_rows)
        self._selection = Selection(setting.model, setting.params)
        self._gradient = mean_gradient(
            setting.model, setting.loss_fn, removed, params=setting.params
        )
        self._full_solution = self._solution(full)

    def exact(self) -> Record:
        """The influence with the Hessian of all training rows."""
        return self._remove("exact influence", None, None, None, 0.0)

    def subset(self, sampler: str, m: int, seed: int) -> Record:
        """The influence with the Hessian of one sampled subset."""
        start = time.perf_counter()
        chosen = make_sampler(sampler, self.data, m, seed=seed)
        return self._remove(sampler, m, seed, chosen, time.perf_counter() - start)

    def gradient_only(self) -> Record:
        """Gradient ascent on the class: g in place of (H + damping I)^-1 g, the same step rule."""
        s, start = self.setting, time.perf_counter()
        removed, first = take(s.train, self._removed_rows), len(self._removed_rows) / len(s.train)
        direction = self._selection.embed(self._gradient)
        step, _, reached = shortest_step(
            s.model, direction, removed, s.class_index, first=first, guard=self._guard
        )
        seconds = time.perf_counter() - start
        edited = apply_update(s.model, direction, step)
        metrics = class_metrics(edited, s.test, s.class_index)
        return Record(
            "gradient only",
            None,
            None,
            **metrics._asdict(),
            target_reached=reached,
            solve_seconds=seconds,
        )

    def retrained(self, model: nn.Module, seconds: float) -> Record:
        """A model that was trained without the class: what removal should come to."""
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
        s = self.setting
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what they say is in converged and target_reached
                report = remove_class(
                    s.model,
                    s.train,
                    s.class_index,
                    test=s.test,
                    sampler=AllRows(len(s.train)) if sampler is None else sampler,
                    loss_fn=s.loss_fn,
                    solver=s.solver,
                    linearisations=s.linearisations,
                    params=s.params,
                    curvature=s.curvature,
                    removed_samples=None,
                    damping=s.damping,
                    tol=s.tol,
                )
        except SolverDivergence as error:
            return Record(method, m, seed, failure=str(error), sample_seconds=sample_seconds)
        seconds = time.perf_counter() - start
        hvp_error, ihvp_error = (None, None) if sampler is None else self._errors(sampler)
        return Record(
            method,
            m,
            seed,
            **report.after._asdict(),
            hvp_error=hvp_error,
            ihvp_error=ihvp_error,
            damping=report.directions[0].solve.damping,
            iterations=report.iterations,
            converged=report.converged,
            target_reached=report.target_reached,
            sample_seconds=sample_seconds,
            solve_seconds=seconds,
            peak_megabytes=report.peak.megabytes,
        )

    def _errors(self, sampler: SubsetSampler) -> tuple[float, float | None]:
        """Relative errors of H_S v and of the iHVP; None where the subset is too indefinite."""
        rows = take(self.setting.train, sampler.indices)
        subset = self._operator(rows, sampler.weights)
        hvp_error = _relative_error(subset @ self._probe, self._full_product)
        try:
            return hvp_error, _relative_error(self._solution(subset), self._full_solution)
        except SolverDivergence:
            return hvp_error, None

    def _operator(self, rows: Any, weights: Tensor | None) -> Any:
        s = self.setting
        return make_curvature(
            s.curvature, s.model, s.loss_fn, rows, weights=weights, params=s.params
        )

    def _solution(self, H: Any) -> Tensor:
        return cg(H, self._gradient, damping=self.common_damping, tol=1e-4).x


def _relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).double().norm() / want.double().norm())
