"""The method's figures on scikit-learn's digits, on the setting they were published for.

MLP 64-32-10 tanh, float64, mean cross-entropy + 1e-3/2 |theta|^2 by L-BFGS, 75 % of the digits for
training. Sampler errors are |H_S v - H v| / |H v|, the mean over 16 standard normal v and 100
seeds.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fastif_ext as fi
from fastif_ext import datasets, models
from fastif_ext.comparison import make_sampler
from fastif_ext.data import loader, take
from fastif_ext.metrics import class_metrics
from fastif_ext.training import train_lbfgs

SEEDS = 100

pytestmark = pytest.mark.usefixtures("one_thread")


def fit(data: TensorDataset) -> nn.Module:
    model = models.build("mlp", seed=0, dtype=torch.float64)
    train_lbfgs(model, *data.tensors, l2=1e-3)
    return model


@functools.cache
def digits() -> tuple[TensorDataset, TensorDataset, nn.Module, fi.Extracted]:
    data = datasets.load("digits")
    model = fit(data.train)
    extracted = fi.extract(model, loader(data.train), layer="penultimate", progress=False)
    return data.train, data.test, model, extracted


@functools.cache
def errors(sampler: str, m: int) -> Tensor:
    """Relative error of H_S v for each seed."""
    train, _, model, extracted = digits()
    loss = nn.functional.cross_entropy
    full = fi.Hessian(model, loss, train)
    v = torch.randn(16, full.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = full @ v
    found = []
    for seed in range(SEEDS):
        s = make_sampler(sampler, extracted, m, seed=seed)
        got = fi.Hessian(model, loss, take(train, s.indices), weights=s.weights) @ v
        found.append(float(((got - want).norm(dim=1) / want.norm(dim=1)).mean()))
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("sampler", "m", "low", "high"),
    [
        ("random", 100, 0.48, 0.70),
        ("random", 400, 0.22, 0.30),
        ("stratified", 100, 0.48, 0.70),
        ("stratified", 400, 0.22, 0.30),
        ("logit", 100, 0.48, 0.70),
        ("logit", 400, 0.22, 0.32),
        ("curvature", 100, 0.22, 0.34),
        # bottom-k draws without replacement: below the .146 of drawing with replacement
        ("curvature", 400, 0.06, 0.154),
    ],
)
def test_error_of_the_product(sampler: str, m: int, low: float, high: float) -> None:
    assert low <= float(errors(sampler, m).mean()) <= high


@pytest.mark.parametrize("m", [100, 400])
def test_logit_is_stratified_random_in_disguise(m: int) -> None:
    ratio = float(errors("logit", m).mean() / errors("random", m).mean())
    assert 0.85 <= ratio <= 1.20


@pytest.mark.parametrize(("m", "most"), [(100, 0.56), (400, 0.64)])
def test_curvature_needs_several_times_fewer_rows(m: int, most: float) -> None:
    """An error ratio of .5 is a factor of four in rows."""
    for other in ("random", "stratified", "logit"):
        assert float(errors("curvature", m).mean() / errors(other, m).mean()) <= most


@pytest.mark.parametrize(("m", "most"), [(100, 0.85), (400, 0.65)])
def test_systematic_curvature_sampling_is_better_still(m: int, most: float) -> None:
    ratio = errors("curvature-systematic", m).mean() / errors("curvature", m).mean()
    assert float(ratio) <= most


def test_logits_are_calibrated_per_class() -> None:
    """sum_i p_iy = n_y at a minimum with free biases: why logit sampling is nearly uniform."""
    train, _, _, extracted = digits()
    share = extracted.logits.softmax(1).sum(0) / train.tensors[1].bincount()
    assert float((share - 1).abs().max()) < 0.01


@functools.cache
def exact(damping: float) -> Any:
    train, _, model, _ = digits()
    rows = (train.tensors[1] == 3).nonzero().flatten()
    return fi.influence(
        model, nn.functional.cross_entropy, rows, train, solver="cg", damping=damping, tol=1e-6
    )


def test_cg_iterations() -> None:
    assert 12 <= exact(0.1).solve.iterations <= 24
    assert exact(0.1).solve.converged


class TestRemoval:
    def f1(self, delta: Tensor, step: float) -> float:
        _, test, model, _ = digits()
        return class_metrics(fi.apply_update(model, delta, step), test, 3).f1

    def test_exact_influence_at_the_training_rule(self) -> None:
        train, test, model, _ = digits()
        everything = fi.AllRows(len(train))
        report = fi.remove_class(
            model, train, 3, test=test, sampler=everything, damping=0.01, linearisations=1
        )
        assert report.f1 == pytest.approx(0.990, abs=0.006)
        theory = self.f1(report.influence.delta, report.theory_step)
        assert theory < 0.2  # the first-order step changes almost nothing
        assert 2 < report.step / report.theory_step < 50

    def test_retraining(self) -> None:
        train, test, _, _ = digits()
        kept = take(train, (train.tensors[1] != 3).nonzero().flatten())
        assert class_metrics(fit(kept), test, 3).f1 == pytest.approx(0.992, abs=0.006)

    def test_best_steps(self) -> None:
        """The best F1 over steps: .990 +- .003 by influence, .976 +- .005 by the gradient alone."""
        train, _, model, _ = digits()
        rows = (train.tensors[1] == 3).nonzero().flatten()
        steps = [len(rows) / len(train) * 1.3**k for k in range(30)]
        g = fi.mean_gradient(model, nn.functional.cross_entropy, take(train, rows))
        assert max(self.f1(g, s) for s in steps) == pytest.approx(0.976, abs=0.006)
        assert max(self.f1(exact(0.01).delta, s) for s in steps) == pytest.approx(0.990, abs=0.004)

    def test_curvature_subset_matches_exact_influence(self) -> None:
        train, test, model, extracted = digits()
        found = []
        for seed in range(5):
            sampler = make_sampler("curvature", extracted, 200, seed=seed)
            report = fi.remove_class(model, train, 3, test=test, sampler=sampler)
            found.append(report.f1)
        assert sum(found) / len(found) > 0.975

    def test_the_default_protocol_comes_to_retraining(self) -> None:
        """The mean F1 over 5 seeds is within .005 of retraining's."""
        train, test, model, _ = digits()
        kept = take(train, (train.tensors[1] != 3).nonzero().flatten())
        want = class_metrics(fit(kept), test, 3).f1
        found = [fi.remove_class(model, train, 3, test=test, seed=seed).f1 for seed in range(5)]
        assert abs(sum(found) / 5 - want) < 0.005
