"""Which of the known failures of influence on a subset are at hand, and what helps.

The signatures are those of the paper (arXiv 2510.26776): estimates that differ from seed to seed, a
self-loss that does not rise, LiSSA that does not converge, memory. Added are the premise of logit
sampling and weights that lean on few rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastif_ext.curvature import Hessian
from fastif_ext.data import Rows, count, device_of, loader, map_style, take
from fastif_ext.diagnostics import calibration, effective_sample_size
from fastif_ext.extract import Extracted, extract
from fastif_ext.influence import check_rows
from fastif_ext.lissa import lissa
from fastif_ext.metrics import fit
from fastif_ext.objective import Loss, mean_gradient
from fastif_ext.parameters import Params, Selection, apply_update
from fastif_ext.samplers import SubsetSampler
from fastif_ext.spectrum import SolverDivergence, resolve_damping, spectrum

AGREE = 0.9  # mean cosine between the solutions of two seeds; below it the sampler decides
RISE = 0.5  # self-loss must rise by at least this share of what theory predicts for the step
TEST_RISE = 0.1  # nats of predicted rise: small enough for theory to hold, far above rounding
STEPS = 1000  # LiSSA's steps to a residual of 1e-3
MEMORY = 0.5  # share of the available memory that the graph of a product may take
RATIO = 0.05  # |sum_i p_iy / n_y - 1|, above which the model is not at a minimum
EFFECTIVE = 0.3  # effective sample size, as a share of the rows


@dataclass(frozen=True)
class Finding:
    """One signature of failure."""

    name: str
    applies: bool
    """Whether it is at hand."""
    value: float
    threshold: float
    explanation: str
    """What was measured, and what it means."""
    remedy: str
    """What helps, where it applies."""


@dataclass(frozen=True)
class Diagnosis:
    """What diagnose found."""

    findings: list[Finding]
    sampler: str

    @property
    def healthy(self) -> bool:
        """Whether no signature applies."""
        return not any(finding.applies for finding in self.findings)

    def summary(self) -> str:
        """The findings in a few lines each."""
        lines = [f"Diagnosis of influence with {self.sampler}:"]
        for f in self.findings:
            lines.append(f"  [{'!!' if f.applies else 'ok'}] {f.name}: {f.explanation}")
            if f.applies:
                lines.append(f"       remedy: {f.remedy}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain values."""
        return {
            "sampler": self.sampler,
            "healthy": self.healthy,
            "findings": [vars(finding) for finding in self.findings],
        }


def diagnose(
    model: nn.Module,
    loss_fn: Loss,
    train: Rows,
    removed: Tensor,
    sampler: Callable[[Extracted, int], SubsetSampler],
    *,
    seeds: int = 3,
    params: Params = None,
    damping: float | str = "auto",
    available_memory: int | None = None,
) -> Diagnosis:
    """Look for the known failures of influence on a sampled subset.

    For each seed a subset is drawn, its spectrum looked at, and LiSSA run for the influence of the
    removed rows. Nothing is changed.

    Args:
        model: maps inputs to logits [b, Y].
        loss_fn: loss_fn(outputs, labels) -> mean loss, the one the model was trained with.
        train: the training set: a map-style dataset of (inputs, label), or (inputs, labels).
        removed: int64, the rows whose influence is asked for.
        sampler: called with what fastif_ext.extract gives for `train` (with the features of the
            last linear layer, where there is one) and a seed; returns the sampler to examine.
        seeds: subsets to draw, at least 2.
        params: the selected parameters.
        damping: a number, or "auto".
        available_memory: in bytes; by default what is free on the model's device.

    Returns:
        Diagnosis, with ``.findings`` and ``.summary()``.

    Raises:
        ValueError: fewer than 2 seeds, no labels, removed rows out of range.

    Example:
        >>> import torch, fastif_ext as fi
        >>> x = torch.randn(300, 3)
        >>> data = torch.utils.data.TensorDataset(x, x.argmax(1))
        >>> found = fi.diagnose(
        ...     torch.nn.Linear(3, 3), torch.nn.functional.cross_entropy, data, torch.arange(30),
        ...     lambda extracted, seed: fi.CurvatureSampler(extracted.logits, 100, seed=seed),
        ... )
        >>> len(found.findings)
        6
    """
    train = map_style("diagnose: train", train)
    if seeds < 2:
        raise ValueError(f"diagnose: seeds must be at least 2, got {seeds}")
    layer = "penultimate" if any(isinstance(m, nn.Linear) for m in model.modules()) else None
    got = extract(model, loader(train), layer=layer, progress=False)
    if got.labels is None:
        raise ValueError("diagnose: train must give (inputs, label); it has no labels")
    rows = take(train, check_rows("removed", removed, count(train)))
    g = mean_gradient(model, loss_fn, rows, params=params)
    runs = [_run(model, loss_fn, train, sampler(got, s), g, params, damping) for s in range(seeds)]
    ratio = len(removed) / len(got.labels)
    solved = [run for run in runs if run.x is not None]
    return Diagnosis(
        [
            _seeds_agree(runs),
            _self_loss(model, rows, g, solved, params, ratio),
            _converges(runs),
            _memory(runs, _available(model) if available_memory is None else available_memory),
            _calibrated(got),
            _weights(runs),
        ],
        repr(runs[0].sampler),
    )


@dataclass
class _Run:
    sampler: SubsetSampler
    smallest: float
    largest: float
    damping: float
    x: Tensor | None
    """None where the damped subset was indefinite or LiSSA did not converge."""
    iterations: int
    graph_bytes: int


def _run(
    model: nn.Module,
    loss_fn: Loss,
    train: Dataset[Any],
    sampler: SubsetSampler,
    g: Tensor,
    params: Params,
    damping: float | str,
) -> _Run:
    H = Hessian(
        model, loss_fn, take(train, sampler.indices), weights=sampler.weights, params=params
    )
    ends = spectrum(H, g)
    lam, _ = resolve_damping(H, g, damping)
    x, iterations = None, STEPS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not converged: a finding
            result = lissa(H, g, damping=lam, tol=1e-3, max_iter=STEPS)
        iterations = result.iterations
        x = result.x if result.converged else None
    except SolverDivergence:
        pass
    return _Run(sampler, ends.smallest, ends.largest, lam, x, iterations, H.graph_bytes)


def _seeds_agree(runs: list[_Run]) -> Finding:
    solutions = [run.x.double() for run in runs if run.x is not None]
    cosines = [
        float(torch.cosine_similarity(a, b, dim=0))
        for i, a in enumerate(solutions)
        for b in solutions[:i]
    ]
    agreement = sum(cosines) / len(cosines) if cosines else 0.0
    return Finding(
        "estimates differ from seed to seed",
        agreement < AGREE,
        agreement,
        AGREE,
        f"solutions of {len(solutions)} of {len(runs)} seeds have a mean cosine of {agreement:.2f}",
        "draw more rows, or draw them by curvature with weights (CurvatureSampler, method "
        "'systematic'); raise damping",
    )


def _self_loss(
    model: nn.Module,
    rows: Dataset[Any],
    g: Tensor,
    runs: list[_Run],
    params: Params,
    ratio: float,
) -> Finding:
    """A step along x that raises the loss on the removed rows by TEST_RISE to first order."""
    name = "self-loss does not rise"
    remedy = (
        "the Hessian is indefinite along the gradient, or the step is beyond its linear range: "
        "raise damping, use GaussNewton, take several directions (remove_class, linearisations)"
    )
    before = _loss(model, rows)
    shares = []
    for run in runs:
        assert run.x is not None
        slope = float(g.double() @ run.x.double())
        if slope <= 0:
            shares.append(0.0)
            continue
        delta = Selection(model, params).embed(run.x)
        after = _loss(apply_update(model, delta, TEST_RISE / slope), rows)
        shares.append((after - before) / TEST_RISE)
    worst = min(shares, default=0.0)
    text = f"a step that should raise it by {TEST_RISE} nats raises it by {worst * TEST_RISE:.3f}"
    if not shares:
        text = "no seed has a solution to step along"
    return Finding(name, worst < RISE, worst, RISE, text, remedy)


def _loss(model: nn.Module, rows: Dataset[Any]) -> float:
    got = extract(model, loader(rows), progress=False)
    assert got.labels is not None
    return fit(got.logits, got.labels).loss


def _converges(runs: list[_Run]) -> Finding:
    slowest = max(run.iterations for run in runs)
    refused = sum(run.x is None for run in runs)
    lowest, lam = min(run.smallest for run in runs), max(run.damping for run in runs)
    largest = max(run.largest for run in runs)
    text = f"{slowest} steps to a residual of 1e-3; eigenvalues {lowest:.3g} to {largest:.3g}, "
    text += f"damping {lam:.3g}"
    if refused:
        text = f"{refused} of {len(runs)} seeds have no solution in {STEPS} steps; " + text
    return Finding(
        "LiSSA does not converge",
        refused > 0,
        float(slowest),
        float(STEPS),
        text,
        f"damping above {max(-lowest, 0.0):.3g} (damping='auto' takes 1 % of the largest "
        f"eigenvalue or twice the most negative one), GaussNewton, variant 'gif', cg in place of "
        f"lissa, or more rows",
    )


def _memory(runs: list[_Run], free: int) -> Finding:
    needed = max(run.graph_bytes for run in runs)
    m = len(runs[0].sampler)
    share = needed / free if free else 0.0
    return Finding(
        "a product does not fit into memory",
        share > MEMORY,
        share,
        MEMORY,
        f"the graph of {m} rows takes {needed / 1e6:.0f} MB of {free / 1e9:.1f} GB that are free; "
        f"it grows with the rows",
        "chunk_size= rebuilds the graph in parts (slower); fewer rows by curvature sampling have "
        "the error of several times as many random ones",
    )


def _available(model: nn.Module) -> int:
    """Bytes of memory that are free on the model's device; 0 where the system does not tell."""
    device = device_of(model)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _calibrated(got: Extracted) -> Finding:
    assert got.labels is not None
    found = calibration(got.logits, got.labels)
    low, high = found.marginal
    return Finding(
        "the premise of logit sampling fails",
        found.worst > RATIO,
        found.worst,
        RATIO,
        f"sum_i p_iy / n_y differs from 1 by up to {found.worst:.3f}; a row's chance in the logit "
        f"sampler is {low:.2f} to {high:.2f} times 1/n",
        "train to a minimum with free biases, or do not use the logit sampler: its subset is "
        "biased. Where the premise holds it is stratified random sampling",
    )


def _weights(runs: list[_Run]) -> Finding:
    share = min(
        effective_sample_size(run.sampler.weights) / len(run.sampler.weights) for run in runs
    )
    return Finding(
        "few rows carry the weight",
        share < EFFECTIVE,
        share,
        EFFECTIVE,
        f"the effective sample size is {share:.2f} of the rows",
        "a larger uniform share (CurvatureSampler, uniform=) bounds the weights; leave it where "
        "hvp_error is low",
    )
