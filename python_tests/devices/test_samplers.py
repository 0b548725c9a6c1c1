"""Samplers and k-means: the same seed gives the same rows wherever the data is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastif_ext as fi
from fastif_ext import device as device_module
from fastif_ext.lloyd import _draw_rows, _integer_cumsum

pytestmark = pytest.mark.usefixtures("one_thread")

N, CLASSES = 400, 5


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels, features."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(N, CLASSES, generator=g)
    logits[::7] = logits[::7].round()  # ties
    centers = 6 * torch.randn(CLASSES, 8, generator=g)
    labels = torch.arange(N) % CLASSES
    return logits, labels, centers[labels] + torch.randn(N, 8, generator=g)


Make = Callable[[Tensor, Tensor, Tensor], fi.SubsetSampler]
SAMPLERS: dict[str, Make] = {
    "logit": lambda z, y, x: fi.LogitSampler(z, 6, seed=3),
    "logit, replacement": lambda z, y, x: fi.LogitSampler(z, 6, replacement=True, seed=3),
    "logit, by label": lambda z, y, x: fi.LogitSampler(z, 6, labels=y, seed=3),
    "curvature": lambda z, y, x: fi.CurvatureSampler(z, 40, seed=3),
    "curvature, scaled": lambda z, y, x: fi.CurvatureSampler(
        z, 40, row_scale=x.square().sum(1) + 1, seed=3
    ),
    "curvature, systematic": lambda z, y, x: fi.CurvatureSampler(
        z, 40, method="systematic", seed=3
    ),
    "residual": lambda z, y, x: fi.ResidualSampler(z, y, 40, seed=3),
    "stratified": lambda z, y, x: fi.StratifiedSampler(y, 40, seed=3),
    "feature, nearest": lambda z, y, x: fi.FeatureSampler(x, 40, n_clusters=CLASSES, seed=3),
    "feature, distance": lambda z, y, x: fi.FeatureSampler(
        x, 40, n_clusters=CLASSES, mode="distance", seed=3
    ),
}


@pytest.mark.parametrize("labels_on_cpu", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seed_gives_the_same_rows(name: str, labels_on_cpu: bool, place: str) -> None:
    logits, labels, features = data()
    want = SAMPLERS[name](logits, labels, features)
    got = SAMPLERS[name](
        logits.to(place), labels if labels_on_cpu else labels.to(place), features.to(place)
    )
    assert got.indices.device.type == got.weights.device.type == "cpu"
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.weights, want.weights)
    assert all(type(row) is int for row in got)
    assert list(got) == want.indices.tolist()


class Table(nn.Module):
    """A model that looks its logits up, so that they are the same bits on every device."""

    def __init__(self) -> None:
        super().__init__()
        logits, _, features = data()
        self.logits = nn.Parameter(logits)
        self.features = nn.Parameter(features)
        self.layer = nn.Identity()

    def forward(self, rows: Tensor) -> Tensor:
        self.layer(self.features[rows])
        return self.logits[rows]


Load = Callable[[nn.Module, Any], fi.SubsetSampler]
FROM_LOADER: dict[str, Load] = {
    "logit": lambda m, b: fi.LogitSampler.from_loader(m, b, 6, seed=3, progress=False),
    "logit, by label": lambda m, b: fi.LogitSampler.from_loader(
        m, b, 6, by_label=True, seed=3, progress=False
    ),
    "curvature": lambda m, b: fi.CurvatureSampler.from_loader(m, b, 40, seed=3, progress=False),
    "curvature, scaled": lambda m, b: fi.CurvatureSampler.from_loader(
        m, b, 40, layer="layer", seed=3, progress=False
    ),
    "curvature, systematic": lambda m, b: fi.CurvatureSampler.from_loader(
        m, b, 40, method="systematic", seed=3, progress=False
    ),
    "feature, nearest": lambda m, b: fi.FeatureSampler.from_loader(
        m, b, 40, layer="layer", seed=3, progress=False
    ),
    "feature, distance": lambda m, b: fi.FeatureSampler.from_loader(
        m, b, 40, layer="layer", mode="distance", seed=3, progress=False
    ),
}


@pytest.mark.parametrize("name", FROM_LOADER)
def test_from_a_loader_of_cpu_batches(name: str, place: str) -> None:
    loader = DataLoader(TensorDataset(torch.arange(N), data()[1]), batch_size=96)
    got = FROM_LOADER[name](Table().to(place), loader)
    want = SAMPLERS[name](*data())
    assert got.indices.device.type == "cpu"
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.weights, want.weights)


@pytest.mark.parametrize("name", FROM_LOADER)
def test_without_kernels_for_the_device_the_cpu_samples(
    name: str, simulated: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU build of fastif_ext with a model on a GPU."""
    monkeypatch.setattr(device_module, "KERNELS", ("cpu",))
    test_from_a_loader_of_cpu_batches(name, "simulated")


def test_extract_gives_cpu_tensors_of_a_model_anywhere(place: str) -> None:
    loader = DataLoader(TensorDataset(torch.arange(N), data()[1]), batch_size=96)
    got = fi.extract(Table().to(place), loader, layer="layer", progress=False)
    logits, labels, features = data()
    assert {t.device.type for t in got if t is not None} == {"cpu"}
    assert torch.equal(got.logits, logits)
    assert torch.equal(got.labels, labels)
    assert torch.equal(got.features, features)
    moved = fi.extract(Table(), loader, device="cpu", progress=False)
    assert torch.equal(moved.logits, logits)


@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans(init: str, weighted: bool, place: str) -> None:
    x = data()[2]
    weight = torch.linspace(0.5, 2, N) if weighted else None
    want = fi.KMeans(CLASSES, init=init, seed=1).fit(x, weight)
    got = fi.KMeans(CLASSES, init=init, seed=1).fit(
        x.to(place), None if weight is None else weight.to(place)
    )
    assert got.cluster_centers_.device.type == got.labels_.device.type == place
    assert torch.equal(got.labels_.cpu(), want.labels_)
    torch.testing.assert_close(got.cluster_centers_.cpu(), want.cluster_centers_)
    assert got.n_iter_ == want.n_iter_
    chunked = []
    for where in ("cpu", place):
        model = fi.KMeans(CLASSES, init=init, seed=1)
        for part in x.to(where).split(150):
            model.partial_fit(part)
        assert model.transform(x.to(where)).device.type == where
        chunked.append(model.predict(x.to(where)).cpu())
    assert torch.equal(*chunked)


def test_empty_clusters_are_filled_anywhere(place: str) -> None:
    x = data()[2]
    far = torch.cat([x[:3], x.new_full((2, 8), 1e3)])
    results = [
        fi.KMeans(5, init=far.to(where), seed=0).fit(x.to(where)) for where in ("cpu", place)
    ]
    assert torch.equal(results[0].labels_, results[1].labels_.cpu())
    assert len(results[0].labels_.unique()) == 5


def test_seeding_does_not_wait_in_every_step(
    simulated: Callable[[Tensor], Tensor], traffic: Any
) -> None:
    from fastif_ext.lloyd import plus_plus_rows

    x = simulated(data()[2])
    traffic.waits.clear()
    rows = plus_plus_rows(x, None, 12, torch.Generator().manual_seed(0))
    assert not traffic.waits
    want = plus_plus_rows(data()[2], None, 12, torch.Generator().manual_seed(0))
    assert torch.equal(rows.cpu(), want)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_whole_cumulative_sums(scale: float) -> None:
    """2^-62 n of the largest is far below what a draw can tell apart."""
    mass = scale * torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mass[::3] = 0
    whole = _integer_cumsum(mass)
    torch.testing.assert_close(whole.double() / whole[-1], mass.cumsum(0) / mass.sum())
    assert (whole.diff() == 0)[mass[1:] == 0].all()
    assert not _integer_cumsum(torch.zeros(5, dtype=torch.float64)).any()


def test_draws_agree_between_devices(place: str) -> None:
    mass = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mass[::2] = 0
    uniform = torch.rand(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draws = [_draw_rows(mass.to(w), uniform.to(w)).cpu() for w in ("cpu", place)]
    assert torch.equal(*draws)
    assert (draws[1] % 2 == 1).all()


def test_ties_are_broken_in_one_way() -> None:
    """topk breaks them as it likes; half-precision logits are full of them."""
    from fastif_ext.samplers.curvature import boundary_position

    logits = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 0.0], [-torch.inf] * 3])
    position = boundary_position(logits)
    assert position[:2].tolist() == [[1.0, 0.0], [1.0, 2.0]]
    assert position.isfinite().all()


def test_weighted_random_sampler(place: str) -> None:
    weights = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    drawn = [
        list(
            fi.WeightedRandomSampler(
                weights.to(where), 50, False, generator=torch.Generator().manual_seed(1)
            )
        )
        for where in ("cpu", place)
    ]
    assert drawn[0] == drawn[1]
    assert all(type(row) is int for row in drawn[1])


def test_diagnostics(place: str) -> None:
    logits, labels, features = data()
    rows = torch.arange(30)
    want = fi.coverage(features, rows, labels=labels)
    got = fi.coverage(features.to(place), rows.to(place), labels=labels.to(place))
    assert got == pytest.approx(want, rel=1e-5)
    assert fi.coverage(features.to(place), rows)[:2] == pytest.approx(want[:2], rel=1e-5)
    a, b = fi.calibration(logits, labels), fi.calibration(logits.to(place), labels.to(place))
    torch.testing.assert_close(a.ratios, b.ratios)
    assert fi.effective_sample_size(torch.ones(4).to(place)) == 4


def test_the_reference_runs_anywhere(place: str) -> None:
    logits, _, features = data()
    for run in (
        lambda move: fi.reference.class_multinomial(move(logits), 3, seed=1)[0],
        lambda move: fi.reference.bottom_k(move(logits.abs().T), 3, seed=1)[0],
        lambda move: fi.reference.curvature_multinomial(move(logits), 9, seed=1)[0],
        lambda move: fi.reference.kmeans_weighted(move(features), move(features[:3]), 2, seed=1),
    ):
        assert torch.equal(run(lambda t: t), run(lambda t: t.to(place)).cpu())
