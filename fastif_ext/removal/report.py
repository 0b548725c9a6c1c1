"""What removals and corrections report."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastif_ext.influence import InfluenceResult
from fastif_ext.memory import PeakMemory
from fastif_ext.metrics import ClassMetrics, Fit

KEEP = 0.9
"""A model that keeps less than this share of its accuracy on the rows that stay is broken."""


class StepRecord(NamedTuple):
    """One step that the search tried."""

    step: float
    self_accuracy: float
    """On the training rows of the class (default protocol) or on the test set (paper's)."""
    f1: float | None
    """On the test set; None in the default protocol, which does not look at it."""
    linearisation: int = 0
    """Which direction the step was tried along: 0 for the first."""
    kept_accuracy: float | None = None
    """On rows that stay (default protocol); None where they were not looked at."""


@dataclass
class RemovalReport:
    """What remove_class returns."""

    model: nn.Module
    """A copy of the model with the class removed; the original is unchanged."""
    class_index: int
    protocol: str
    """"default" (steps chosen on training rows of the class) or "paper" (on the test set)."""
    before: ClassMetrics
    after: ClassMetrics
    """Both on `test`, or on `train` where no test set was given."""
    delta: Tensor
    """theta' - theta, [p] over all trainable parameters."""
    step: float
    """The last step: theta' = ... + step * influence.delta."""
    theory_step: float
    """n_c / (n - n_c) for curvature of the retained rows, n_c / n in the paper's protocol."""
    target_reached: bool
    """Whether self-accuracy fell below the target (always true in the paper's protocol)."""
    history: list[StepRecord]
    directions: list[InfluenceResult]
    """One for each linearisation."""
    norms: list[float]
    """Length of the step taken along each."""
    kept_before: Fit
    kept_after: Fit
    """On training rows of the other classes, at most 1000 of them."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of "sample", "solve" and "step", over all linearisations."""
    peak: PeakMemory = field(default_factory=PeakMemory)
    """Peak memory above what was in use before, on the model's device."""

    @property
    def influence(self) -> InfluenceResult:
        """The last direction."""
        return self.directions[-1]

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
    def iterations(self) -> int:
        """Iterations of the solver, over all linearisations."""
        return sum(direction.solve.iterations for direction in self.directions)

    @property
    def converged(self) -> bool:
        """Whether every solve reached its tolerance."""
        return all(direction.solve.converged for direction in self.directions)

    @property
    def broken(self) -> bool:
        """Whether more than a tenth of the accuracy on the other classes' training rows is gone."""
        return self.kept_after.accuracy < KEEP * self.kept_before.accuracy

    @property
    def delta_norm(self) -> float:
        """|theta' - theta|."""
        return float(self.delta.norm())

    def to_dict(self) -> dict[str, Any]:
        """The figures of the report, as plain numbers."""
        return {
            "class_index": self.class_index,
            "protocol": self.protocol,
            "before": self.before._asdict(),
            "after": self.after._asdict(),
            "step": self.step,
            "theory_step": self.theory_step,
            "delta_norm": self.delta_norm,
            "target_reached": self.target_reached,
            "kept_before": self.kept_before._asdict(),
            "kept_after": self.kept_after._asdict(),
            "linearisations": len(self.directions),
            "damping": [d.solve.damping for d in self.directions],
            "iterations": self.iterations,
            "converged": self.converged,
            "residual": max((float(d.solve.residual) for d in self.directions), default=0.0),
            "seconds": self.seconds,
            "peak_megabytes": self.peak.megabytes,
            "peak_of": self.peak.device,
            "history": [record._asdict() for record in self.history],
        }

    def summary(self) -> str:
        """The report in a few lines."""
        b, a = self.before, self.after
        chosen = "training rows of the class" if self.protocol == "default" else "the TEST set"
        lines = [
            f"  F1                  {b.f1:8.4f} -> {a.f1:.4f}",
            f"  self-accuracy       {b.self_accuracy:8.4f} -> {a.self_accuracy:.4f}",
            f"  remaining accuracy  {b.remaining_accuracy:8.4f} -> {a.remaining_accuracy:.4f}",
            f"  self-loss           {b.self_loss:8.4f} -> {a.self_loss:.4f}",
            f"  training accuracy on other classes  {self.kept_before.accuracy:.4f} -> "
            f"{self.kept_after.accuracy:.4f}",
            f"  steps of length {', '.join(f'{n:.3g}' for n in self.norms)}, chosen on {chosen} in "
            f"{self.steps} tries; |change| = {self.delta_norm:.3g}",
        ]
        if self.directions:
            residual = max(float(d.solve.residual) for d in self.directions)
            damping = ", ".join(f"{d.solve.damping:.3g}" for d in self.directions)
            lines.append(
                f"  solve: {self.iterations} iterations, residual {residual:.1e}, damping {damping}"
            )
        lines.append("  seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items()))
        if self.peak.megabytes is not None:
            lines.append(f"  peak memory: {self.peak.megabytes:.1f} MB on {self.peak.device}")
        if not self.target_reached:
            lines.append("  the target self-accuracy was NOT reached")
        if self.broken:
            lines.append("  the other classes are BROKEN: do not use this model")
        return "\n".join(lines)


@dataclass
class EditReport:
    """What remove_rows and correct_labels return."""

    model: nn.Module
    """A copy of the model with the edit; the original is unchanged."""
    delta: Tensor
    """theta' - theta, [p] over all trainable parameters."""
    edited_before: Fit
    edited_after: Fit
    """Accuracy and loss on the edited rows, towards the labels they should have now: their own for
    rows that were removed, the new ones for rows that were corrected."""
    kept_before: Fit
    kept_after: Fit
    """On all other rows of the training set."""
    test_before: Fit | None
    test_after: Fit | None
    """On the test set, where one was given."""
    damping: float
    iterations: int
    """Of the solver, over all steps."""
    converged: bool
    """Whether every solve reached its tolerance."""
    norms: list[float]
    """Length of each step."""
    seconds: float
    peak: PeakMemory
    """Peak memory above what was in use before, on the model's device."""

    @property
    def delta_norm(self) -> float:
        """|theta' - theta|."""
        return float(self.delta.norm())

    def to_dict(self) -> dict[str, Any]:
        """The figures of the report, as plain numbers."""
        fits = ("edited_before", "edited_after", "kept_before", "kept_after")
        on_test = {
            name: None if fit is None else fit._asdict()
            for name, fit in (("test_before", self.test_before), ("test_after", self.test_after))
        }
        return {
            **{name: getattr(self, name)._asdict() for name in fits},
            **on_test,
            "delta_norm": self.delta_norm,
            "norms": self.norms,
            "damping": self.damping,
            "iterations": self.iterations,
            "converged": self.converged,
            "seconds": self.seconds,
            "peak_megabytes": self.peak.megabytes,
            "peak_of": self.peak.device,
        }

    def summary(self) -> str:
        """The report in a few lines."""
        lines = []
        for name, before, after in (
            ("edited rows", self.edited_before, self.edited_after),
            ("other rows", self.kept_before, self.kept_after),
            ("test set", self.test_before, self.test_after),
        ):
            if before is not None and after is not None:
                lines.append(
                    f"  {name:12} accuracy {before.accuracy:.4f} -> {after.accuracy:.4f}, "
                    f"loss {before.loss:.4f} -> {after.loss:.4f}"
                )
        steps = ", ".join(f"{n:.2g}" for n in self.norms)
        lines.append(
            f"  |change| = {self.delta_norm:.3g} in steps of {steps}; {self.iterations} "
            f"iterations, damping {self.damping:.3g}, {self.seconds:.2f} s"
        )
        if self.peak.megabytes is not None:
            lines.append(f"  peak memory: {self.peak.megabytes:.1f} MB on {self.peak.device}")
        return "\n".join(lines)


class Clock:
    """Wall time of stages that may come again."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to a stage."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now
