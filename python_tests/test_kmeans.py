"""The KMeans estimator: contracts, invariances, and its quality against scikit-learn's."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.datasets import load_digits, make_blobs
from torch import Tensor

import fastif_ext as fi
from fastif_ext import lloyd


def digits() -> Tensor:
    return torch.from_numpy(load_digits().data.astype(np.float32))


def blobs(n: int = 3000, d: int = 8, centers: int = 12) -> Tensor:
    rows, _ = make_blobs(n, d, centers=centers, cluster_std=2.0, random_state=1)
    return torch.from_numpy(rows.astype(np.float32))


def inertia(x: Tensor, model: fi.KMeans, weight: Tensor | None = None) -> float:
    own = model.cluster_centers_.double()[model.labels_]
    sqdist = (x.double() - own).square().sum(1)
    return float((sqdist if weight is None else sqdist * weight).sum())


def same(a: fi.KMeans, b: fi.KMeans) -> bool:
    return (
        torch.equal(a.cluster_centers_, b.cluster_centers_)
        and torch.equal(a.labels_, b.labels_)
        and a.inertia_ == b.inertia_
        and a.n_iter_ == b.n_iter_
    )


class TestQuality:
    @pytest.mark.parametrize(("data", "K"), [(digits(), 10), (blobs(), 12), (blobs(centers=20), 9)])
    def test_inertia_against_sklearn(self, data: Tensor, K: int, device: torch.device) -> None:
        """8 seedings each: the same best inertia within 1 %, the same average within 5 %."""
        rows = data.to(device)
        ours = [fi.KMeans(K, seed=s).fit(rows).inertia_ for s in range(8)]
        theirs = [
            SklearnKMeans(K, n_init=1, max_iter=100, random_state=s).fit(data.numpy()).inertia_
            for s in range(8)
        ]
        assert min(ours) <= 1.01 * min(theirs)
        assert np.mean(ours) <= 1.05 * np.mean(theirs)

    def test_same_lloyd_iterations_as_sklearn(self, device: torch.device) -> None:
        """From the same centers, run to convergence: the same labels, centers and inertia."""
        x = digits()
        ours = fi.KMeans(10, init=x[:10], max_iter=300, tol=0).fit(x.to(device))
        theirs = SklearnKMeans(10, init=x[:10].numpy(), n_init=1, max_iter=300, tol=0).fit(
            x.numpy()
        )
        assert torch.equal(ours.labels_.cpu(), torch.from_numpy(theirs.labels_).long())
        np.testing.assert_allclose(ours.cluster_centers_.cpu(), theirs.cluster_centers_, atol=1e-4)
        assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)

    def test_plus_plus_beats_random_seeding(self, device: torch.device) -> None:
        """Separated blobs: k-means++ finds all of them, random rows do not."""
        rows, _ = make_blobs(2000, 5, centers=25, cluster_std=0.1, random_state=3)
        x = torch.from_numpy(rows.astype(np.float32)).to(device)
        plus = [fi.KMeans(25, seed=s).fit(x).inertia_ for s in range(5)]
        random = [fi.KMeans(25, init="random", seed=s).fit(x).inertia_ for s in range(5)]
        assert max(plus) < 150  # 2000 rows x 5 columns x 0.01
        assert min(random) > 1000

    def test_n_init_keeps_the_best(self, device: torch.device) -> None:
        x = blobs(centers=20).to(device)
        one = fi.KMeans(9, init="random", seed=4).fit(x).inertia_
        many = fi.KMeans(9, init="random", n_init=6, seed=4).fit(x).inertia_
        assert many < one  # the first of the six is the one


class TestFit:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("init", ["k-means++", "random"])
    def test_result_is_consistent(
        self, init: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        x = digits().to(device, dtype)
        model = fi.KMeans(7, init=init, seed=0)
        assert model.fit(x) is model
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert model.cluster_centers_.dtype == wide
        assert model.cluster_centers_.shape == (7, 64)
        assert model.cluster_centers_.device.type == model.labels_.device.type == device.type
        assert torch.equal(model.predict(x), model.labels_)
        assert model.inertia_ == pytest.approx(inertia(x, model), rel=1e-5)
        means = torch.stack([x[model.labels_ == j].double().mean(0) for j in range(7)])
        # Within tol: the centers moved by at most this much in the last iteration.
        limit = 1e-4 * float(x.double().var(0, unbiased=False).mean())
        assert float((model.cluster_centers_ - means).square().sum()) <= 2 * limit

    def test_stops_at_max_iter_and_at_a_fixed_point(self, device: torch.device) -> None:
        x = digits().to(device)
        assert fi.KMeans(10, seed=0, max_iter=2, tol=0).fit(x).n_iter_ == 2
        model = fi.KMeans(10, seed=0, max_iter=1000, tol=0).fit(x)
        assert model.n_iter_ < 1000
        means = torch.stack([x[model.labels_ == j].mean(0) for j in range(10)])
        torch.testing.assert_close(model.cluster_centers_, means, rtol=1e-5, atol=1e-4)

    def test_inertia_never_increases(self, device: torch.device) -> None:
        x = blobs(centers=20).to(device)
        steps = [
            fi.KMeans(9, init="random", seed=4, max_iter=m, tol=0).fit(x).inertia_
            for m in range(1, 12)
        ]
        assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(steps))

    def test_seed_threads_and_global_rng(self, threads: None) -> None:
        x, weight = blobs(20000), torch.rand(20000)
        for init in ("k-means++", "random"):
            models = []
            for n in (1, 2):
                torch.set_num_threads(n)
                state = torch.get_rng_state()
                models.append(fi.KMeans(8, init=init, n_init=2, seed=3).fit(x, weight))
                assert torch.equal(torch.get_rng_state(), state)
            assert same(*models)
            other = fi.KMeans(8, init=init, n_init=2, seed=4).fit(x, weight)
            assert not same(models[0], other)

    def test_without_a_seed_the_global_generator_decides(self, device: torch.device) -> None:
        x = blobs(300).to(device)
        models = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            models.append(fi.KMeans(8, max_iter=1).fit(x))
        assert same(models[0], models[1])
        assert not same(models[0], models[2])

    def test_weights_are_multiplicities(self, device: torch.device) -> None:
        x = digits()[:300].to(device)
        weight = torch.arange(300, device=device) % 3  # zero weights among them
        weighted = fi.KMeans(4, init=x[:4], tol=0).fit(x, weight.float())
        repeated = fi.KMeans(4, init=x[:4], tol=0).fit(x.repeat_interleave(weight, 0))
        torch.testing.assert_close(weighted.cluster_centers_, repeated.cluster_centers_)
        assert weighted.inertia_ == pytest.approx(repeated.inertia_, rel=1e-6)
        assert weighted.inertia_ == pytest.approx(inertia(x, weighted, weight), rel=1e-5)

    @pytest.mark.parametrize("init", ["k-means++", "random"])
    def test_rows_without_weight_are_never_seeds(self, init: str, device: torch.device) -> None:
        x = torch.cat([torch.randn(50, 2), torch.full((50, 2), 1e3)]).to(device)
        weight = (torch.arange(100) < 50).float()
        for seed in range(10):
            model = fi.KMeans(5, init=init, seed=seed, max_iter=1).fit(x, weight)
            assert model.cluster_centers_.abs().max() < 10

    @pytest.mark.parametrize("init", ["k-means++", "random"])
    def test_weights_are_left_as_they_are(self, init: str, device: torch.device) -> None:
        x = digits()[:100].double().to(device)
        weight = torch.rand(100, dtype=torch.float64).to(device)
        before = weight.clone()
        fi.KMeans(5, init=init, seed=0).fit(x, weight)
        assert torch.equal(weight, before)

    @pytest.mark.parametrize("weighted", [False, True])
    def test_empty_clusters_are_relocated(self, weighted: bool, device: torch.device) -> None:
        """Three centers far from all rows would stay empty."""
        x = blobs(centers=4, d=2).to(device)
        init = torch.cat([x[:1], torch.full((3, 2), 1e4, device=device)])
        weight = torch.ones(len(x), device=device) if weighted else None
        model = fi.KMeans(4, init=init).fit(x, weight)
        assert model.labels_.bincount(minlength=4).min() > 0
        assert model.inertia_ < 1.5 * fi.KMeans(4, seed=0, n_init=5).fit(x).inertia_
        assert same(model, fi.KMeans(4, init=init).fit(x, weight))

    def test_fewer_distinct_rows_than_clusters(self, device: torch.device) -> None:
        x = torch.tensor([[0.0], [1.0], [5.0]], device=device).repeat(10, 1)
        with pytest.warns(UserWarning, match="only 3 of n_clusters = 6 clusters have a row"):
            model = fi.KMeans(6, seed=0).fit(x)
        assert model.inertia_ == 0
        assert model.cluster_centers_.isfinite().all()

    @pytest.mark.parametrize(("n", "d", "K"), [(1, 1, 1), (5, 3, 5), (9, 0, 1), (40, 1, 3)])
    def test_small_shapes(self, n: int, d: int, K: int, device: torch.device) -> None:
        x = torch.randn(n, d).to(device)
        model = fi.KMeans(K, seed=0).fit(x)
        if n == K:
            assert model.inertia_ == 0
            assert model.labels_.unique().numel() == K
        if K == 1:
            torch.testing.assert_close(model.cluster_centers_, x.mean(0, keepdim=True))

    def test_offset_changes_nothing_but_the_centers(self, device: torch.device) -> None:
        """Rows on a grid of 1/4, 30000 away from zero: float32 holds them exactly."""
        x = ((blobs() * 4).round() / 4).to(device)
        near, far = (fi.KMeans(12, seed=1).fit(rows) for rows in (x, x + 30000))
        assert torch.equal(near.labels_, far.labels_)
        assert near.inertia_ == pytest.approx(far.inertia_, rel=1e-3)

    def test_non_contiguous_and_input_unchanged(self, device: torch.device) -> None:
        x = digits().to(device)
        before = x.clone()
        strided = fi.KMeans(5, seed=0).fit(x[::2, ::2])
        assert same(strided, fi.KMeans(5, seed=0).fit(x[::2, ::2].contiguous()))
        init = x[:5].clone()
        fi.KMeans(5, init=init).fit(x)
        assert torch.equal(init, before[:5])
        assert torch.equal(x, before)

    def test_rows_that_require_grad(self) -> None:
        model = fi.KMeans(3, seed=0).fit(digits().requires_grad_())
        assert not model.cluster_centers_.requires_grad

    @pytest.mark.gpu
    @pytest.mark.parametrize("device", ["cuda"], indirect=True)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    def test_gpu_makes_the_centers_of_the_cpu(
        self, dtype: torch.dtype, device: torch.device
    ) -> None:
        x = blobs(50_000).to(dtype)
        for init in ("random", x[:9]):
            # A fixed number of iterations: distances, and with them tol, agree to rounding only.
            model = fi.KMeans(9, init=init, seed=1, tol=0, max_iter=20)
            on_cpu = model.fit(x).cluster_centers_, model.labels_, model.n_iter_, model.inertia_
            model.fit(x.to(device))
            assert torch.equal(model.cluster_centers_.cpu(), on_cpu[0])
            assert torch.equal(model.labels_.cpu(), on_cpu[1])
            assert model.n_iter_ == on_cpu[2]
            assert model.inertia_ == pytest.approx(on_cpu[3], rel=1e-6)

    @pytest.mark.gpu
    @pytest.mark.parametrize("device", ["cuda"], indirect=True)
    @pytest.mark.parametrize("init", ["k-means++", "random"])
    def test_second_fit_on_a_gpu_gives_the_same_bits(self, init: str, device: torch.device) -> None:
        x, weight = blobs(200_000).to(device), torch.rand(200_000).to(device)
        for w in (None, weight):
            assert same(*(fi.KMeans(20, init=init, seed=3).fit(x, w) for _ in range(2)))


class TestDraws:
    """Rows drawn by mass: with the sums a GPU uses, which the CPU can make as well."""

    @pytest.mark.parametrize("scale", [1e-40, 1.0, 1e30])
    def test_integer_sums_draw_the_same_rows(self, scale: float) -> None:
        mass = torch.rand(10_000, dtype=torch.float64).pow(3) * scale
        mass[::3] = 0
        mass[-5:] = 0
        sums = lloyd._integer_cumsum(mass)
        exact = mass.cumsum(0)
        assert int(sums[-1]) >= 2**60 / len(mass)
        torch.testing.assert_close(
            sums.double() / float(sums[-1]), exact / exact[-1], rtol=1e-11, atol=1e-11
        )
        uniform = torch.rand(2000, dtype=torch.float64)
        position = (uniform * sums[-1]).long()
        rows = torch.searchsorted(sums, position, right=True)
        assert torch.equal(rows, lloyd._draw_rows(mass, uniform))

    def test_zero_mass_is_never_drawn(self, device: torch.device) -> None:
        mass = torch.tensor([0.0, 2.0, 0.0, 1e-9, 1.0, 0.0], dtype=torch.float64, device=device)
        uniform = torch.linspace(0, 1 - 2**-53, 1001, dtype=torch.float64, device=device)
        rows = lloyd._draw_rows(mass, uniform)
        assert rows.unique().tolist() == [1, 4]
        assert float((rows == 1).double().mean()) == pytest.approx(2 / 3, abs=2e-3)


class TestPartialFit:
    def test_centers_are_means_of_all_rows_that_joined(self, device: torch.device) -> None:
        x, weight = blobs(900).to(device), torch.rand(900).to(device)
        model = fi.KMeans(6, seed=0)
        sums = torch.zeros(6, 8, dtype=torch.float64, device=device)
        mass = torch.zeros(6, dtype=torch.float64, device=device)
        for rows, w in zip(x.split(250), weight.split(250), strict=True):
            assert model.partial_fit(rows, w) is model
            sums.index_add_(0, model.labels_, (rows * w[:, None]).double())
            mass.index_add_(0, model.labels_, w.double())
        want = (sums / mass[:, None]).float()
        torch.testing.assert_close(model.cluster_centers_, want, rtol=1e-4, atol=1e-5)
        assert model.n_iter_ == 4

    def test_one_chunk_is_one_iteration(self, device: torch.device) -> None:
        x = blobs().to(device)
        streamed = fi.KMeans(6, seed=0).partial_fit(x)
        fitted = fi.KMeans(6, seed=0, max_iter=1).fit(x)
        torch.testing.assert_close(streamed.cluster_centers_, fitted.cluster_centers_)

    def test_quality_over_a_stream(self, device: torch.device) -> None:
        x = blobs(20000).to(device)
        model = fi.KMeans(12, seed=0)
        for rows in x.split(1000):
            model.partial_fit(rows)
        _, sqdist = fi.kmeans_assign(x, model.cluster_centers_)
        assert float(sqdist.sum()) < 1.1 * fi.KMeans(12, seed=0, n_init=3).fit(x).inertia_

    def test_continues_a_fit(self, device: torch.device) -> None:
        """Also with rows elsewhere than those of the fit: the model follows its rows."""
        x = digits()
        model = fi.KMeans(10, seed=0).fit(x.to(device))
        before = model.cluster_centers_.clone()
        model.partial_fit(x[:1].to(device))  # one row more among 1797: the center moves a little
        moved = (model.cluster_centers_ - before).norm(dim=1)
        assert int((moved > 1e-2).sum()) <= 1
        assert float(moved.max()) < 1
        model.partial_fit(x[:0])
        assert model.inertia_ == 0
        assert model.cluster_centers_.device == x.device


class TestPredictAndTransform:
    def test_new_rows(self, device: torch.device) -> None:
        x = digits().to(device)
        model = fi.KMeans(10, seed=0).fit(x[:1000])
        distance = model.transform(x)
        assert distance.shape == (1797, 10)
        assert torch.equal(distance.argmin(1), model.predict(x))
        want = (x[:, None] - model.cluster_centers_).double().norm(dim=2).float()
        torch.testing.assert_close(distance, want)
        assert torch.equal(model.predict(x.double()), model.predict(x))
        assert model.predict(x[:0]).shape == (0,)
        assert model.transform(x.half()).dtype == torch.float32
        assert torch.equal(model.predict(x.cpu()), model.predict(x).cpu())
        assert model.transform(x.cpu()).device.type == "cpu"

    def test_fit_predict(self, device: torch.device) -> None:
        x = digits().to(device)
        assert torch.equal(fi.KMeans(5, seed=2).fit_predict(x), fi.KMeans(5, seed=2).fit(x).labels_)


class TestBadInput:
    def test_constructor(self) -> None:
        with pytest.raises(ValueError, match="n_clusters must be at least 1, got 0"):
            fi.KMeans(0)
        with pytest.raises(TypeError, match="n_clusters must be an int, got float"):
            fi.KMeans(2.0)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="n_init must be at least 1"):
            fi.KMeans(2, n_init=0)
        with pytest.raises(ValueError, match="max_iter must be at least 1"):
            fi.KMeans(2, max_iter=0)
        for tol in (-1.0, math.nan):
            with pytest.raises(ValueError, match="tol must be at least 0"):
                fi.KMeans(2, tol=tol)
        with pytest.raises(ValueError, match=r"init must be 'k-means\+\+', 'random' or a tensor"):
            fi.KMeans(2, init="kmeans")
        with pytest.raises(
            ValueError, match=r"init has shape \[3, 4\]; it must have n_clusters = 2"
        ):
            fi.KMeans(2, init=torch.zeros(3, 4))

    @pytest.mark.parametrize("method", ["fit", "partial_fit", "fit_predict"])
    def test_data(self, method: str, device: torch.device) -> None:
        def call(x: Tensor, *weight: Tensor, **arguments: object) -> None:
            getattr(fi.KMeans(3, seed=0, **arguments), method)(x, *weight)  # type: ignore[arg-type]

        x = torch.randn(5, 2).to(device)
        with pytest.raises(ValueError, match="x has 2 rows, fewer than n_clusters = 3"):
            call(x[:2])
        with pytest.raises(ValueError, match="x must be 2-D"):
            call(x[0])
        with pytest.raises(TypeError, match="x has dtype"):
            call(x.long())
        for bad in (math.nan, math.inf, -math.inf):
            spoiled = x.clone()
            spoiled[3, 1] = bad
            with pytest.raises(ValueError, match="row 3 of x has NaN or inf"):
                call(spoiled)
        with pytest.raises(ValueError, match="sample_weight has length 4, x has 5 rows"):
            call(x, torch.ones(4))
        for bad in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="sample_weight must be finite and not negative"):
                call(x, torch.tensor([1.0, 1.0, 1.0, 1.0, bad]))
        with pytest.raises(ValueError, match="fewer than n_clusters = 3 rows have a positive"):
            call(x, torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))
        with pytest.raises(ValueError, match=r"x has 2 columns, init has shape \[3, 4\]"):
            call(x, init=torch.zeros(3, 4))

    def test_not_fitted_and_wrong_columns(self) -> None:
        x = torch.randn(5, 2)
        model = fi.KMeans(2, seed=0)
        for method in (model.predict, model.transform):
            with pytest.raises(RuntimeError, match="not fitted; call fit"):
                method(x)
        model.fit(x)
        for method in (model.predict, model.transform, model.partial_fit):
            with pytest.raises(ValueError, match="x has 3 columns, the model was fitted on 2"):
                method(torch.randn(5, 3))
        x[4, 0] = math.nan
        with pytest.raises(ValueError, match="row 4 of x has NaN or inf"):
            model.predict(x)

    def test_no_warning_in_ordinary_use(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fi.KMeans(3, seed=0).fit(digits())
