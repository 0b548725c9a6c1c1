"""Subsets: sizes, laws, weights, invariances and errors of every sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastif_ext as fi

N, Y = 600, 5


@pytest.fixture(scope="module")
def logits() -> Tensor:
    return 3 * torch.randn(N, Y, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def labels(logits: Tensor) -> Tensor:
    return logits.argmax(1)


@pytest.fixture(scope="module")
def features() -> Tensor:
    return torch.randn(N, 7, generator=torch.Generator().manual_seed(1))


Make = Callable[[Tensor, Tensor, Tensor, int], fi.SubsetSampler]

MAKERS: dict[str, Make] = {
    "random": lambda z, y, f, seed: fi.RandomSampler(len(z), 40, seed=seed),
    "stratified": lambda z, y, f, seed: fi.StratifiedSampler(y, 40, seed=seed),
    "logit": lambda z, y, f, seed: fi.LogitSampler(z, 8, seed=seed),
    "logit-replacement": lambda z, y, f, seed: fi.LogitSampler(z, 8, replacement=True, seed=seed),
    "logit-by-label": lambda z, y, f, seed: fi.LogitSampler(z, 8, labels=y, seed=seed),
    "curvature": lambda z, y, f, seed: fi.CurvatureSampler(z, 40, seed=seed),
    "systematic": lambda z, y, f, seed: fi.CurvatureSampler(z, 40, method="systematic", seed=seed),
    "residual": lambda z, y, f, seed: fi.ResidualSampler(z, y, 40, seed=seed),
    "nearest": lambda z, y, f, seed: fi.FeatureSampler(f, 40, n_clusters=Y, seed=seed),
    "distance": lambda z, y, f, seed: fi.FeatureSampler(
        f, 40, n_clusters=Y, mode="distance", seed=seed
    ),
}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest, logits: Tensor, labels: Tensor, features: Tensor) -> Any:
    return lambda seed: MAKERS[request.param](logits, labels, features, seed)


class TestEverySampler:
    def test_indices_and_weights(self, make: Callable[[int], fi.SubsetSampler]) -> None:
        sampler = make(0)
        assert len(sampler) == 40
        assert sampler.indices.dtype == torch.int64
        assert sampler.weights.dtype == torch.float32
        assert sampler.indices.shape == sampler.weights.shape == (40,)
        assert 0 <= sampler.indices.min() <= sampler.indices.max() < N
        assert (sampler.weights > 0).all()
        assert f"40 of {N} rows" in repr(sampler)

    def test_same_seed_same_rows_and_global_rng_untouched(
        self, make: Callable[[int], fi.SubsetSampler], threads: None
    ) -> None:
        rng = torch.get_rng_state()
        samplers = []
        for n in (1, 2):
            torch.set_num_threads(n)
            samplers.append(make(7))
        a, b = samplers
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.weights, b.weights)
        assert torch.equal(torch.get_rng_state(), rng)

    def test_feeds_a_dataloader(self, make: Callable[[int], fi.SubsetSampler]) -> None:
        sampler = make(1)
        data = TensorDataset(torch.arange(N))
        seen = torch.cat([b[0] for b in DataLoader(data, batch_size=16, sampler=sampler)])
        assert torch.equal(seen, sampler.indices)


def test_seeds_differ(make: Callable[[int], fi.SubsetSampler]) -> None:
    assert not torch.equal(make(0).indices, make(1).indices)


@pytest.mark.parametrize("name", ["random", "stratified", "curvature", "systematic", "residual"])
def test_weighted_sum_is_unbiased(
    name: str, logits: Tensor, labels: Tensor, features: Tensor
) -> None:
    """E sum_j w_j x_j = mean x. z-test of a mean over 400 seeds, false alarm 1e-5 per case."""
    x = features[:, 0] + logits[:, 0]
    draws = []
    for seed in range(400):
        s = MAKERS[name](logits, labels, features, seed)
        draws.append(float((s.weights * x[s.indices]).sum()))
    estimate = torch.tensor(draws, dtype=torch.float64)
    z = (estimate.mean() - x.double().mean()) / (estimate.std() / len(draws) ** 0.5)
    assert abs(z) < 4.42


class TestStratified:
    def test_shares(self) -> None:
        labels = torch.tensor([0] * 50 + [1] * 30 + [7] * 20)[torch.randperm(100)]
        sampler = fi.StratifiedSampler(labels, 10, seed=3)
        assert labels[sampler.indices].bincount().tolist() == [5, 3, 0, 0, 0, 0, 0, 2]
        torch.testing.assert_close(sampler.weights, torch.full((10,), 0.1))
        assert len(sampler.indices.unique()) == 10

    def test_rare_label_is_kept_and_weighted_down(self) -> None:
        labels = torch.tensor([0] * 999 + [1])
        sampler = fi.StratifiedSampler(labels, 10, seed=0)
        assert 999 in sampler.indices
        rare = sampler.weights[sampler.indices == 999]
        torch.testing.assert_close(rare, torch.tensor([1 / 1000]))
        torch.testing.assert_close(sampler.weights.sum(), torch.tensor(1.0))

    def test_all_rows_and_bad_input(self) -> None:
        labels = torch.arange(10) % 3
        assert sorted(fi.StratifiedSampler(labels, 10).indices.tolist()) == list(range(10))
        with pytest.raises(ValueError, match="m = 2 is less than the 3 labels"):
            fi.StratifiedSampler(labels, 2)
        with pytest.raises(ValueError, match="between 1 and the 10 rows given, got 11"):
            fi.StratifiedSampler(labels, 11)
        with pytest.raises(TypeError, match="integers, got torch.float32"):
            fi.StratifiedSampler(labels.float(), 3)


class TestLogit:
    def test_rows_come_from_class_multinomial(self, logits: Tensor) -> None:
        sampler = fi.LogitSampler(logits, 8, seed=5)
        rows = fi.class_multinomial(logits, 8, seed=5).rows
        assert torch.equal(sampler.indices, rows.flatten())
        torch.testing.assert_close(sampler.weights, torch.full((40,), 1 / 40))

    def test_a_row_may_stand_for_two_classes(self) -> None:
        """Both rows are drawn for every class: a multiset of 2 Y."""
        sampler = fi.LogitSampler(torch.zeros(2, 3), 2, seed=0)
        assert sampler.indices.bincount().tolist() == [3, 3]

    def test_by_label_draws_within_the_label(self, logits: Tensor, labels: Tensor) -> None:
        sampler = fi.LogitSampler(logits, 8, labels=labels, seed=0)
        assert torch.equal(labels[sampler.indices], torch.arange(Y).repeat_interleave(8))

    def test_bad_input(self, logits: Tensor, labels: Tensor) -> None:
        nan = logits.clone()
        nan[17, 2] = float("nan")
        with pytest.raises(ValueError, match=r"NaN or \+inf in 1 rows, the first is row 17"):
            fi.LogitSampler(nan, 4)
        with pytest.raises(ValueError, match=r"samples_per_class = 3, but class 0 has only 2 rows"):
            fi.LogitSampler(torch.zeros(2, 3), 3)
        empty_class = logits.clone()
        empty_class[:, 1] = -torch.inf
        with pytest.raises(ValueError, match="class 1 has only 0 rows"):
            fi.LogitSampler(empty_class, 1)
        with pytest.raises(ValueError, match=r"labels must have shape \[600\]"):
            fi.LogitSampler(logits, 3, labels=labels[:-1])
        with pytest.raises(ValueError, match="between 0 and 4, the columns of logits; got 0 to 9"):
            fi.LogitSampler(logits, 3, labels=labels.clone().fill_(9).index_fill(0, labels[:1], 0))
        with pytest.raises(ValueError, match="floating-point tensor"):
            fi.LogitSampler(logits[0], 3)


class TestCurvature:
    @pytest.mark.parametrize("method", ["bottom-k", "systematic"])
    def test_all_rows_get_equal_weights(self, logits: Tensor, method: str) -> None:
        sampler = fi.CurvatureSampler(logits, N, method=method)
        assert sorted(sampler.indices.tolist()) == list(range(N))
        torch.testing.assert_close(sampler.weights, torch.full((N,), 1 / N))

    @pytest.mark.parametrize("method", ["bottom-k", "systematic"])
    def test_prefers_the_boundary(self, logits: Tensor, method: str) -> None:
        size = 1 - logits.softmax(1).square().sum(1)
        sampler = fi.CurvatureSampler(logits, 60, method=method, seed=0)
        assert len(sampler.indices.unique()) == 60
        assert size[sampler.indices].mean() > 1.2 * size.mean()
        order = size[sampler.indices].argsort()
        assert (sampler.weights[order].diff() <= 1e-9).all()  # larger size, smaller weight

    def test_uniform_one_is_uniform(self, logits: Tensor) -> None:
        sampler = fi.CurvatureSampler(logits, 50, uniform=1.0, seed=0)
        assert sampler.weights.unique().numel() == 1

    def test_row_scale_of_zero_is_never_drawn_without_uniform_part(self, logits: Tensor) -> None:
        scale = (torch.arange(N) % 2).float()
        sampler = fi.CurvatureSampler(logits, 100, uniform=0.0, row_scale=scale, seed=0)
        assert (sampler.indices % 2 == 1).all()
        with pytest.raises(ValueError, match="only 300 rows have positive size; take uniform > 0"):
            fi.CurvatureSampler(logits, 301, uniform=0.0, row_scale=scale)

    def test_confident_model_falls_back_to_uniform_sizes(self) -> None:
        certain = 1000 * torch.eye(4).repeat(20, 1)
        sampler = fi.CurvatureSampler(certain, 10, seed=0)
        assert sampler.weights.unique().numel() == 1

    def test_systematic_has_less_variance(self, logits: Tensor) -> None:
        """Sum of weights as the estimate: systematic PPS balances it over the strata."""
        spread = {
            method: torch.stack(
                [
                    fi.CurvatureSampler(logits, 40, method=method, seed=s).weights.sum()
                    for s in range(200)
                ]
            ).std()
            for method in ("bottom-k", "systematic")
        }
        assert spread["systematic"] < 0.7 * spread["bottom-k"]

    def test_bad_input(self, logits: Tensor) -> None:
        with pytest.raises(ValueError, match="uniform must be between 0 and 1, got 1.5"):
            fi.CurvatureSampler(logits, 3, uniform=1.5)
        with pytest.raises(ValueError, match="method must be 'bottom-k' or 'systematic'"):
            fi.CurvatureSampler(logits, 3, method="poisson")
        with pytest.raises(ValueError, match="between 1 and the 600 rows given, got 0"):
            fi.CurvatureSampler(logits, 0)
        with pytest.raises(TypeError, match="m must be an int, got float"):
            fi.CurvatureSampler(logits, 3.0)


class TestFeature:
    def test_nearest_are_the_nearest(self, features: Tensor) -> None:
        sampler = fi.FeatureSampler(features, 40, n_clusters=4, mode="nearest", seed=2)
        kmeans = fi.KMeans(4, seed=2).fit(features)
        for c in range(4):
            own = (kmeans.labels_ == c).nonzero().flatten()
            distance = (features[own] - kmeans.cluster_centers_[c]).norm(dim=1)
            chosen = sampler.indices[kmeans.labels_[sampler.indices] == c]
            assert len(chosen) == 10
            assert set(chosen.tolist()) == set(own[distance.argsort()[:10]].tolist())

    @pytest.mark.parametrize("mode", ["nearest", "distance"])
    def test_small_clusters_give_what_they_have(self, mode: str) -> None:
        far = torch.cat([torch.randn(3, 2) * 0.01 + 100, torch.randn(97, 2)])
        sampler = fi.FeatureSampler(far, 20, n_clusters=2, mode=mode, seed=0)
        assert (sampler.indices < 3).sum() == 3
        assert len(sampler.indices.unique()) == 20

    def test_bad_input(self, features: Tensor) -> None:
        with pytest.raises(ValueError, match="mode must be 'nearest' or 'distance', got 'far'"):
            fi.FeatureSampler(features, 5, n_clusters=2, mode="far")
        with pytest.raises(ValueError, match="n_clusters must be between 1 and m = 5, got 6"):
            fi.FeatureSampler(features, 5, n_clusters=6)


class TestFromLoader:
    @pytest.fixture
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, Y))

    @pytest.fixture
    def data(self, features: Tensor, labels: Tensor) -> TensorDataset:
        return TensorDataset(features, labels)

    @pytest.mark.parametrize("batch_size", [1, 64, 600])
    @pytest.mark.parametrize(
        ("cls", "args"),
        [
            (fi.LogitSampler, {"samples_per_class": 9}),
            (fi.LogitSampler, {"samples_per_class": 9, "replacement": True}),
            (fi.CurvatureSampler, {"m": 30}),
            (fi.CurvatureSampler, {"m": 30, "method": "systematic"}),
        ],
    )
    def test_equals_the_whole(
        self, model: nn.Module, data: TensorDataset, batch_size: int, cls: Any, args: dict[str, Any]
    ) -> None:
        """Batches of any size give the rows that all logits at once give.

        The logits themselves may differ in the last bit between batch sizes (other GEMM shapes),
        so the whole is made of the same batches.
        """
        loader = DataLoader(data, batch_size=batch_size)
        logits = fi.extract(model, loader, progress=False).logits
        whole = cls(logits, **args, seed=4)
        streamed = cls.from_loader(model, loader, **args, seed=4, progress=False)
        assert torch.equal(streamed.indices, whole.indices)
        assert torch.equal(streamed.weights, whole.weights)
        assert streamed.n == whole.n == N

    def test_by_label(self, model: nn.Module, data: TensorDataset, labels: Tensor) -> None:
        loader = DataLoader(data, batch_size=50)
        logits = fi.extract(model, loader, progress=False).logits
        streamed = fi.LogitSampler.from_loader(model, loader, 5, by_label=True, progress=False)
        assert torch.equal(streamed.indices, fi.LogitSampler(logits, 5, labels=labels).indices)
        with pytest.raises(
            ValueError, match="labels are needed, but the loader's batches hold none"
        ):
            fi.LogitSampler.from_loader(
                model, DataLoader(data.tensors[0]), 5, by_label=True, progress=False
            )

    def test_features_and_row_scale(self, model: nn.Module, data: TensorDataset) -> None:
        loader = DataLoader(data, batch_size=50)
        got = fi.extract(model, loader, layer="penultimate", progress=False)
        assert got.features is not None
        feature = fi.FeatureSampler.from_loader(model, loader, 20, progress=False, seed=1)
        whole = fi.FeatureSampler(got.features, 20, n_clusters=Y, seed=1)
        assert torch.equal(feature.indices, whole.indices)
        scaled = fi.CurvatureSampler.from_loader(
            model, loader, 20, layer="penultimate", progress=False, seed=1
        )
        scale = got.features.square().sum(1) + 1
        whole_scaled = fi.CurvatureSampler(got.logits, 20, row_scale=scale, seed=1)
        assert torch.equal(scaled.indices, whole_scaled.indices)

    def test_nan_names_the_row_of_the_dataset(self, features: Tensor) -> None:
        bad = features.clone()
        bad[333, 0] = float("nan")
        loader = DataLoader(TensorDataset(bad), batch_size=100)
        with pytest.raises(ValueError, match="the first is row 333"):
            fi.CurvatureSampler.from_loader(nn.Linear(7, Y), loader, 5, progress=False)
