"""Influence, scores, removal and diagnosis with a model away from the CPU and data on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastif_ext as fi
from fastif_ext.comparison import Comparison, Setting
from fastif_ext.training import accuracy, train, train_lbfgs

pytestmark = pytest.mark.usefixtures("one_thread")


def data() -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 3
    centers = 2 * torch.eye(3, 6, dtype=torch.float64)
    return TensorDataset(
        centers[labels] + 0.7 * torch.randn(240, 6, generator=g, dtype=torch.float64), labels
    )


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    model = network()
    train_lbfgs(model, *data().tensors, l2=1e-2)
    return model.state_dict()


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def trained(weights: dict[str, Tensor], place: str) -> nn.Module:
    model = network()
    model.load_state_dict(weights)
    return model.to(place)


def on_device(place: str) -> TensorDataset:
    return TensorDataset(*(t.to(place) for t in data().tensors))


@pytest.mark.parametrize("variant", ["if", "pif", "fif", "gif", "sif"])
def test_influence(variant: str, weights: dict[str, Tensor], place: str) -> None:
    options: dict[str, Any] = {"variant": variant, "damping": 0.4, "tol": 1e-6}
    if variant in ("pif", "fif", "gif"):
        options["params"] = ["2.*"]
    found = []
    for where, rows, train_set in (
        ("cpu", torch.arange(20), data()),
        (place, torch.arange(20), data()),
        (place, torch.arange(20).to(place), on_device(place)),
    ):
        model = trained(weights, where)
        sampler = fi.StratifiedSampler(data().tensors[1], 90, seed=0)
        got = fi.influence(model, F.cross_entropy, rows, train_set, sampler=sampler, **options)
        assert got.delta.device.type == where
        assert got.solve.converged
        found.append(got.delta.cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("curvature", "solver"),
    [("hessian", "cg"), ("gauss-newton", "cg"), ("linear-softmax", "lissa"), ("hessian", "exact")],
)
def test_scores(curvature: str, solver: str, weights: dict[str, Tensor], place: str) -> None:
    subset = TensorDataset(*(t[:40] for t in data().tensors))
    found = []
    for where in ("cpu", place):
        options: dict[str, Any] = {
            "curvature": curvature,
            "solver": solver,
            "damping": 0.3,
            "tol": 1e-6,
            "sampler": fi.RandomSampler(40, 30, seed=0),
        }
        model = trained(weights, where)
        scores = fi.influence_scores(
            model, F.cross_entropy, subset, subset, test_chunk=16, train_chunk=15, **options
        )
        own = fi.self_influence(model, F.cross_entropy, subset, chunk=16, **options)
        assert scores.device.type == own.device.type == where
        torch.testing.assert_close(scores.diagonal(), own, rtol=1e-4, atol=1e-4)
        found.append(scores.cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_remove_class(weights: dict[str, Tensor], place: str) -> None:
    reports = []
    for where in ("cpu", place):
        model = trained(weights, where)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        report = fi.remove_class(model, data(), 1, damping=0.4, samples=90, removed_samples=40)
        assert next(report.model.parameters()).device.type == where
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert report.delta.device.type == where
        reports.append(report)
    a, b = reports
    assert b.self_accuracy < 0.01
    torch.testing.assert_close(b.delta.cpu(), a.delta, rtol=1e-2, atol=1e-3)
    assert b.step == pytest.approx(a.step, rel=1e-3)
    assert b.peak.device == ("cuda" if place == "cuda" else "cpu")
    if place == "cuda":
        assert b.peak.megabytes > 0
        assert "on cuda" in b.summary()


def test_paper_protocol_and_samplers_of_any_kind(weights: dict[str, Tensor], place: str) -> None:
    class Elsewhere:  # a user's sampler that keeps its rows on the device
        indices = torch.arange(0, 240, 2).to(place)
        weights = torch.full((120,), 1 / 120).to(place)

    model = trained(weights, place)
    paper = fi.remove_class(
        model, data(), 1, test=data(), protocol="paper", damping=0.4, sampler=Elsewhere()
    )
    assert paper.f1 > 0.8
    fixed = fi.remove_class(model, data(), 1, damping=0.4, sampler=Elsewhere())
    chosen = fi.remove_class(
        model, data(), 1, damping=0.4, sampler=lambda got, k: fi.RandomSampler(len(got.logits), 90)
    )
    assert fixed.f1 > 0.8
    assert chosen.f1 > 0.8


def test_edits(weights: dict[str, Tensor], place: str) -> None:
    rows, labels = torch.tensor([9, 3, 30]), torch.tensor([1, 2, 2])
    found = []
    for where in ("cpu", place):
        model = trained(weights, where)
        options: dict[str, Any] = {"damping": 0.4, "steps": 2, "samples": 120, "tol": 1e-6}
        removed = fi.remove_rows(model, data(), rows.to(where), **options)
        relabelled = fi.correct_labels(
            model, data(), rows.to(where), labels.to(where), test=data(), **options
        )
        on_it = fi.correct_labels(model, on_device(where), rows, labels, **options)
        torch.testing.assert_close(on_it.delta, relabelled.delta, rtol=1e-3, atol=1e-5)
        found.append((removed.delta.cpu(), relabelled.delta.cpu()))
        assert "loss" in removed.summary()
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("by", ["output", "gradient"])
def test_select_parameters(by: str, weights: dict[str, Tensor], place: str) -> None:
    masks = [
        fi.select_parameters(trained(weights, where), data(), 0.5, by=by)
        for where in ("cpu", place)
    ]
    assert torch.equal(*masks)


def test_diagnose(weights: dict[str, Tensor], place: str) -> None:
    found = [
        fi.diagnose(
            trained(weights, where),
            F.cross_entropy,
            data(),
            torch.arange(1, 240, 3).to(where),
            lambda got, seed: fi.CurvatureSampler(got.logits, 100, seed=seed),
            seeds=2,
        )
        for where in ("cpu", place)
    ]
    assert [f.applies for f in found[0].findings] == [f.applies for f in found[1].findings]


def test_comparison(weights: dict[str, Tensor], place: str) -> None:
    records = []
    for where in ("cpu", place):
        model = trained(weights, where)
        got = fi.extract(model, DataLoader(data(), 64), layer="penultimate", progress=False)
        comparison = Comparison(Setting(model, data(), data(), 1), got)
        records.append([comparison.exact(), comparison.subset("curvature", 60, 0)])
        assert comparison.gradient_only().f1 > 0.5
    for a, b in zip(*records, strict=True):
        assert b.failure is None
        assert b.f1 == pytest.approx(a.f1, abs=0.02)
    assert records[1][1].hvp_error == pytest.approx(records[0][1].hvp_error, rel=1e-3)


def test_training(place: str) -> None:
    model = network()
    losses = train(model, data(), epochs=3, lr=0.01, device=place)
    assert next(model.parameters()).device.type == place
    assert losses[-1] < losses[0]
    again = network()
    train(again, on_device(place), epochs=3, lr=0.01, device=place)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert accuracy(model, data()) == accuracy(model, on_device(place)) > 0.5
    result = train_lbfgs(model, *on_device(place).tensors, l2=0.1, tol=1e-5)
    assert result.converged


@pytest.mark.gpu
def test_pinned_loaders(weights: dict[str, Tensor], gpu: str) -> None:
    loader = DataLoader(data(), 50, pin_memory=True)
    H = fi.Hessian(trained(weights, gpu), F.cross_entropy, loader)
    want = fi.Hessian(trained(weights, "cpu"), F.cross_entropy, data())
    v = torch.ones(H.dim, dtype=torch.float64)
    torch.testing.assert_close((H @ v.to(gpu)).cpu(), want @ v)
