"""Contracts of the k-means operators, against their pure-PyTorch twins."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastif_ext as fi
from fastif_ext import ops, reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = [  # n, d, K: below, at and above the sizes of panels, tiles and tasks
    (0, 3, 2),
    (1, 1, 1),
    (5, 7, 9),
    (49, 8, 8),
    (193, 65, 11),
    (500, 13, 1),
    (777, 300, 17),
    (97, 2100, 5),
]
NAN, INF = math.nan, math.inf


def case(n: int, d: int, K: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1000 * n + 10 * d + K)
    x = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randn(K, d, generator=g, dtype=torch.float64).to(dtype)


def to(device: torch.device | str, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(device) for t in tensors)


def on(device: torch.device, t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(device)


def close(got: Tensor, want: Tensor) -> None:
    """A few units in the last place of got's dtype, NaN equal to NaN."""
    rtol = 3e-6 if got.dtype == torch.float32 else 1e-14
    torch.testing.assert_close(got, want, rtol=rtol, atol=0, equal_nan=True)


def assign(
    device: torch.device, x: Tensor, centroids: Tensor, precision: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Labels and distances as found on the device, on the CPU."""
    x, centroids = x.to(device), centroids.to(device)
    labels, sqdist = fi.kmeans_assign(x, centroids, precision=precision)
    return labels.cpu(), sqdist.cpu()


def check_assign(device: torch.device, x: Tensor, centroids: Tensor) -> None:
    labels, sqdist = assign(device, x, centroids)
    want_labels, want_sqdist = reference.kmeans_assign(x.cpu(), centroids.cpu())
    assert torch.equal(labels, want_labels)
    close(sqdist, want_sqdist)


class TestAssign:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("n", "d", "K"), SHAPES)
    def test_equals_twin(
        self, device: torch.device, n: int, d: int, K: int, dtype: torch.dtype
    ) -> None:
        check_assign(device, *case(n, d, K, dtype))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_float32_centroids_with_half_rows(
        self, device: torch.device, dtype: torch.dtype
    ) -> None:
        x, centroids = case(200, 33, 7)
        check_assign(device, x.to(dtype), centroids)

    def test_no_columns(self, device: torch.device) -> None:
        labels, sqdist = assign(device, torch.empty(3, 0), torch.empty(2, 0))
        assert labels.tolist() == [0, 0, 0]
        assert sqdist.tolist() == [0, 0, 0]

    def test_non_contiguous(self, device: torch.device) -> None:
        x, centroids = (t.to(device) for t in case(40, 60, 6))
        check_assign(device, x[::2, ::3], centroids[:, ::3])
        check_assign(device, x.t()[:, :7], centroids[:, :7])

    @pytest.mark.parametrize("d", [1, 16, 65, 700])
    def test_labels_are_exact_at_near_ties(self, device: torch.device, d: int) -> None:
        """Rows a few float32 roundings away from the midpoint between two of the centroids.

        The scores in float32 cannot tell these apart: a plain float32 argmin gets many wrong.
        """
        g = torch.Generator().manual_seed(d)
        centroids = torch.randn(12, d, generator=g)
        pairs = torch.randint(12, (2000, 2), generator=g)
        a, b = centroids[pairs[:, 0]], centroids[pairs[:, 1]]
        x = (a + b) / 2 + 1e-6 * torch.randn(2000, d, generator=g)
        check_assign(device, x, centroids)
        scores = x @ centroids.T - centroids.square().sum(1) / 2
        assert (scores.argmax(1) != reference.kmeans_assign(x, centroids)[0]).any()

    @pytest.mark.parametrize("offset", [1e3, 1e5])
    def test_common_offset(self, device: torch.device, offset: float) -> None:
        """Data 1000 (and 1e5) standard deviations away from zero keeps its distances."""
        x, centroids = case(400, 50, 10)
        check_assign(device, x + offset, centroids + offset)

    def test_ties_go_to_the_lowest_index(self, device: torch.device) -> None:
        x, centroids = case(300, 20, 5)
        labels, _ = assign(device, x, centroids.repeat(4, 1))
        assert torch.equal(labels, assign(device, x, centroids)[0])
        line = torch.tensor([[2.0], [0.0], [1.0]])
        assert assign(device, torch.tensor([[1.5], [0.5]]), line)[0].tolist() == [0, 1]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_non_finite_rows_and_centroids(
        self, device: torch.device, bad: float, dtype: torch.dtype
    ) -> None:
        x, centroids = case(100, 19, 9, dtype)
        x[3, 18], x[50, 0], centroids[0, 4], centroids[8, 18] = bad, bad, bad, bad
        labels, sqdist = assign(device, x, centroids)
        assert labels[[3, 50]].tolist() == [-1, -1]
        assert sqdist[[3, 50]].isnan().all()
        assert sqdist.isnan().sum() == 2
        assert not ((labels == 0) | (labels == 8)).any()
        check_assign(device, x, centroids)
        labels, sqdist = assign(device, x, torch.full_like(centroids, bad))
        assert (labels == -1).all()
        assert sqdist.isnan().all()

    @pytest.mark.parametrize("scale", [1e30, 1e19, 1e-20, 1e-30, 1e-44])
    def test_labels_survive_overflow_and_underflow(
        self, device: torch.device, scale: float
    ) -> None:
        x, centroids = case(200, 12, 6)
        x, centroids = x * scale, centroids * scale
        labels, sqdist = assign(device, x, centroids)
        want_labels, want = reference.kmeans_assign(x, centroids)
        assert torch.equal(labels, want_labels)
        torch.testing.assert_close(sqdist, want, rtol=3e-6, atol=1e-37)
        huge = torch.full((2, 1), 1e300, dtype=torch.float64)  # overflows float64 as well
        assert assign(device, huge, -huge)[0].tolist() == [0, 0]

    def test_threads_and_chunks_change_no_bit(self, device: torch.device, threads: None) -> None:
        x, centroids = case(3000, 70, 37)
        torch.set_num_threads(1)
        labels, sqdist = assign(device, x, centroids)
        torch.set_num_threads(2)
        for chunks in (1, 7):
            parts = [assign(device, part, centroids) for part in x.chunk(chunks)]
            assert torch.equal(torch.cat([p[0] for p in parts]), labels)
            assert torch.equal(torch.cat([p[1] for p in parts]), sqdist)

    def test_precisions_agree(self, device: torch.device) -> None:
        x, centroids = case(100, 10, 4)
        results = [assign(device, x, centroids, precision=p) for p in ("auto", "fp32", "tf32")]
        for labels, sqdist in results:
            assert torch.equal(labels, results[0][0])
            assert torch.equal(sqdist, results[0][1])

    @settings(
        max_examples=60,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],  # a device has no state
    )
    @given(
        n=st.integers(0, 60),
        d=st.integers(1, 20),
        K=st.integers(1, 20),
        levels=st.integers(1, 4),
        seed=st.integers(0, 2**31),
    )
    def test_integer_grids(
        self, device: torch.device, n: int, d: int, K: int, levels: int, seed: int
    ) -> None:
        """Values from a small grid: many exact ties and zero distances, all exact in float32."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randint(levels, (n, d), generator=g).float()
        centroids = torch.randint(levels, (K, d), generator=g).float()
        labels, sqdist = assign(device, x, centroids)
        want_labels, want = reference.kmeans_assign(x, centroids)
        assert torch.equal(labels, want_labels)
        assert torch.equal(sqdist, want)


class TestUpdate:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("n", "d", "K"), [*SHAPES, (5000, 17, 2), (30, 33, 100), (4, 0, 3), (0, 3, 0)]
    )
    def test_equals_twin(
        self, n: int, d: int, K: int, dtype: torch.dtype, weighted: bool, device: torch.device
    ) -> None:
        x, _ = case(n, d, 1, dtype)
        labels = torch.randint(-1, K, (n,))
        weight = torch.rand(n, dtype=torch.float64) if weighted else None
        sums, counts = fi.kmeans_update(*to(device, x, labels), K, weight=on(device, weight))
        want_sums, want_counts = reference.kmeans_update(x, labels, K, weight=weight)
        rtol = 1e-5 if sums.dtype == torch.float32 else 1e-13
        torch.testing.assert_close(sums.cpu(), want_sums, rtol=rtol, atol=100 * rtol)
        assert torch.equal(counts.cpu(), want_counts)
        if not weighted:
            assert torch.equal(sums.cpu(), fi.kmeans_update(x, labels, K)[0])

    def test_ignored_rows_may_hold_anything(self, device: torch.device) -> None:
        x = torch.tensor([[NAN], [1.0], [INF], [2.0]], device=device)
        sums, counts = fi.kmeans_update(x, torch.tensor([-1, 1, -1, 1], device=device), 2)
        assert sums.tolist() == [[0.0], [3.0]]
        assert counts.tolist() == [0, 2]
        sums, _ = fi.kmeans_update(x, torch.tensor([0, 1, 1, 1], device=device), 2)
        assert sums[0].isnan().all()
        assert sums[1].tolist() == [INF]

    def test_long_clusters_keep_their_precision(self, device: torch.device) -> None:
        """Ones beyond 2^24 could not be counted in float32; half a unit here is 1/2^23 of a sum."""
        x = torch.full((1_000_003, 2), 0.1, device=device)
        labels = torch.zeros(len(x), dtype=torch.int64, device=device)
        sums, counts = fi.kmeans_update(x, labels, 1)
        torch.testing.assert_close(sums, x.double().sum(0, keepdim=True).float(), rtol=3e-6, atol=0)
        assert counts.tolist() == [1_000_003]

    def test_threads_change_no_bit(self, threads: None) -> None:
        x, _ = case(20000, 37, 1)
        labels = (torch.rand(20000).square() * 40).long() - 1
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(fi.kmeans_update(x, labels, 40, weight=x[:, 0].contiguous()))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])

    def test_non_contiguous(self, device: torch.device) -> None:
        x = case(60, 40, 1)[0].to(device)
        labels = torch.randint(5, (120,)).to(device)[::4]
        weight = torch.rand(90).to(device)[::3]
        got = fi.kmeans_update(x[::2, ::3], labels, 5, weight=weight)
        want = reference.kmeans_update(*to("cpu", x[::2, ::3], labels), 5, weight=weight.cpu())
        torch.testing.assert_close(to("cpu", *got), want)
        shifted = x.flatten()[1:-39].view(59, 40)  # contiguous, but off the boundaries of vectors
        got = fi.kmeans_update(shifted, labels[:1].expand(59), 5)
        want = fi.kmeans_update(shifted.cpu(), labels[:1].cpu().expand(59), 5)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))

    @pytest.mark.parametrize("label", [-2, 3, 2**40])
    def test_labels_out_of_range(self, label: int, device: torch.device) -> None:
        labels = torch.tensor([0, 2, label, 7], device=device)
        with pytest.raises(RuntimeError, match=rf"labels\[2\] = {label} is outside \[-1, 3\)"):
            fi.kmeans_update(torch.zeros(4, 2, device=device), labels, 3)
        with pytest.raises(RuntimeError, match=r"labels\[0\] = 0 is outside \[-1, 0\)"):
            fi.kmeans_update(torch.zeros(4, 2, device=device), labels, 0)


class TestNearest:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("k", [0, 1, 6, 1000])
    @pytest.mark.parametrize(("n", "d", "K"), SHAPES)
    def test_equals_twin(
        self, n: int, d: int, K: int, k: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        x, centroids = case(n, d, K, dtype)
        index, sqdist = to("cpu", *fi.kmeans_nearest(*to(device, x, centroids), k))
        want_index, want_sqdist = reference.kmeans_nearest(x, centroids, k)
        close(sqdist, want_sqdist)
        assert index.shape == (K, k)
        different = index != want_index  # only where rounded distances changed places
        assert not ((index < 0) != (want_index < 0)).any()
        assert different.float().mean().nan_to_num() < 0.01

    def test_ties_padding_and_bad_rows(self, device: torch.device) -> None:
        x = torch.tensor([[1.0], [-1.0], [NAN], [9.0], [0.0], [1.0]], device=device)
        centroids = torch.tensor([[0.0], [9.0], [NAN]], device=device)
        index, sqdist = fi.kmeans_nearest(x, centroids, 3)
        assert index.tolist() == [[4, 0, 1], [3, -1, -1], [-1, -1, -1]]
        assert sqdist.tolist() == [[0, 1, 1], [0, INF, INF], [INF, INF, INF]]
        index, _ = fi.kmeans_nearest(x, centroids[:1], 9)
        assert index.tolist() == [[4, 0, 1, 5, 3, -1, -1, -1, -1]]


class TestWeighted:
    @pytest.mark.parametrize("k", [0, 1, 6, 100])
    @pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
    @pytest.mark.parametrize(("n", "d", "K"), [(0, 3, 2), (1, 1, 1), (300, 5, 4)])
    def test_equals_twin(
        self, n: int, d: int, K: int, seed: int, k: int, device: torch.device
    ) -> None:
        """Float64 rows: the twin's distances have the same rounding or nearly so."""
        x, centroids = case(n, d, K, torch.float64)
        got = fi.kmeans_weighted(*to(device, x, centroids), k, seed=seed)
        assert torch.equal(got.cpu(), reference.kmeans_weighted(x, centroids, k, seed=seed))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_members_without_replacement(self, dtype: torch.dtype, device: torch.device) -> None:
        x, centroids = to(device, *case(500, 9, 6, dtype))
        x[7] = NAN
        labels, _ = fi.kmeans_assign(x, centroids)
        index = fi.kmeans_weighted(x, centroids, 500, seed=3)
        for j in range(6):
            chosen = index[j][index[j] >= 0]
            assert chosen.sort().values.tolist() == (labels == j).nonzero()[:, 0].tolist()
        assert (index[:, :-1] >= 0).logical_or(index[:, 1:] < 0).all()  # padding is at the end

    def test_zero_distance_comes_first(self, device: torch.device) -> None:
        x = torch.tensor([[3.0], [0.0], [1e-20], [0.0]], device=device)
        for seed in range(20):
            index = fi.kmeans_weighted(x, torch.zeros(1, 1, device=device), 3, seed=seed)
            assert index[0, :2].tolist() == [1, 3]

    def test_law_of_successive_sampling(self, device: torch.device) -> None:
        """Ordered pairs from one cluster of 4 rows at distances 1, 2, 4, 8, over 4000 seeds.

        Chi-square with 11 degrees of freedom; the limit 31.3 gives a false alarm rate of 0.1 %
        for a new choice of seeds (these are fixed).
        """
        distance = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
        x, draws = distance[:, None].to(device), 4000
        centroids = torch.zeros_like(x[:1])
        seen = torch.zeros(4, 4, dtype=torch.float64)
        for seed in range(draws):
            first, second = fi.kmeans_weighted(x, centroids, 2, seed=seed)[0].tolist()
            seen[first, second] += 1
        weight = 1 / distance
        chi_square = 0.0
        for i, j in itertools.permutations(range(4), 2):
            total = weight.sum()
            expected = draws * weight[i] / total * weight[j] / (total - weight[i])
            chi_square += float((seen[i, j] - expected) ** 2 / expected)
        assert seen.diagonal().sum() == 0
        assert chi_square < 31.3

    def test_seed_and_generator(self, device: torch.device) -> None:
        x, centroids = to(device, *case(200, 4, 3))
        draw = [
            fi.kmeans_weighted(x, centroids, 5, generator=torch.Generator().manual_seed(s))
            for s in (1, 1, 2)
        ]
        assert torch.equal(draw[0], draw[1])
        assert not torch.equal(draw[0], draw[2])
        state = torch.get_rng_state()
        fi.kmeans_weighted(x, centroids, 5, seed=1)
        assert torch.equal(torch.get_rng_state(), state)
        first = fi.kmeans_weighted(x, centroids, 5)  # from the global generator
        torch.set_rng_state(state)
        assert torch.equal(fi.kmeans_weighted(x, centroids, 5), first)

    def test_threads_change_no_bit(self, threads: None) -> None:
        x, centroids = case(5000, 6, 9)
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            near = fi.kmeans_nearest(x, centroids, 50)
            results.append((fi.kmeans_weighted(x, centroids, 50, seed=5), *near))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class TestCandidates:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("n", "d", "L"), [*SHAPES, (300, 40, 0), (6, 0, 2)])
    def test_equals_twin(
        self, n: int, d: int, L: int, dtype: torch.dtype, weighted: bool, device: torch.device
    ) -> None:
        x, candidates = case(n, d, L, dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        sqdist = torch.rand(n).to(wide) * 4 * d
        sqdist[::7] = INF
        weight = torch.rand(n).to(wide) if weighted else None
        least, potential = ops.kmeans_candidates(
            *to(device, x, candidates, sqdist), weight=on(device, weight)
        )
        want, want_potential = reference.kmeans_candidates(x, candidates, sqdist, weight=weight)
        close(least.cpu(), want)
        torch.testing.assert_close(potential.cpu(), want_potential, rtol=3e-6, atol=0)

    def test_nan_changes_nothing(self, device: torch.device) -> None:
        x, one = torch.tensor([[NAN], [0.0]], device=device), torch.ones(1, 1, device=device)
        least, _ = ops.kmeans_candidates(x, one, torch.tensor([3.0, 3.0], device=device))
        assert least.tolist() == [[3.0, 1.0]]

    def test_threads_change_no_bit(self, threads: None) -> None:
        x, candidates = case(3001, 37, 6)
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(ops.kmeans_candidates(x, candidates, torch.full((3001,), 80.0)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_bad_input(self, device: torch.device) -> None:
        x, c, s = to(device, torch.zeros(4, 3), torch.zeros(2, 3), torch.zeros(4))
        with pytest.raises(ValueError, match=r"x has shape \[4, 3\], candidates \[2, 2\]"):
            ops.kmeans_candidates(x, c[:, :2], s)
        with pytest.raises(ValueError, match="sqdist has length 3, x has 4 rows"):
            ops.kmeans_candidates(x, c, s[:3])
        with pytest.raises(TypeError, match=r"weight has dtype torch\.float64"):
            ops.kmeans_candidates(x, c, s, weight=s.double())
        with pytest.raises(RuntimeError, match="sqdist must be"):
            torch.ops.fastif_ext.kmeans_candidates(x, c, s[:3])


class TestAllOperators:
    def test_bad_input(self, device: torch.device) -> None:
        x, c, labels = to(
            device, torch.zeros(4, 3), torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64)
        )
        for call in (
            fi.kmeans_assign,
            lambda x, c: fi.kmeans_nearest(x, c, 1),
            lambda x, c: fi.kmeans_weighted(x, c, 1, seed=0),
        ):
            with pytest.raises(ValueError, match=r"x has shape \[4, 3\], centroids \[2, 2\]"):
                call(x, c[:, :2])
            with pytest.raises(ValueError, match=r"x must be 2-D, got shape \[4\]"):
                call(x[:, 0], c)
            with pytest.raises(ValueError, match="centroids has no row"):
                call(x, c[:0])
            with pytest.raises(TypeError, match=r"centroids has dtype torch.float64, x has"):
                call(x, c.double())
            with pytest.raises(TypeError, match=r"x has dtype torch.int64; supported"):
                call(x.long(), c)
            with pytest.raises(RuntimeError, match=r"pass c.*\.detach\(\)"):
                call(x, c.clone().requires_grad_())
            with torch.no_grad():
                call(x, c.clone().requires_grad_())
        with pytest.raises(ValueError, match=r"precision must be one of .* got .fp16."):
            fi.kmeans_assign(x, c, precision="fp16")
        with pytest.raises(ValueError, match="k must be at least 0, got -1"):
            fi.kmeans_nearest(x, c, -1)
        with pytest.raises(TypeError, match="k must be an int, got float"):
            fi.kmeans_weighted(x, c, 1.0, seed=0)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="either seed or generator"):
            fi.kmeans_weighted(x, c, 1, seed=0, generator=torch.Generator())
        with pytest.raises(ValueError, match="labels has length 3, x has 4 rows"):
            fi.kmeans_update(x, labels[:3], 2)
        with pytest.raises(TypeError, match=r"labels has dtype torch\.int32"):
            fi.kmeans_update(x, labels.int(), 2)
        with pytest.raises(ValueError, match="weight has length 2, x has 4 rows"):
            fi.kmeans_update(x, labels, 2, weight=torch.ones(2, device=device))
        with pytest.raises(ValueError, match="n_clusters must be at least 0, got -1"):
            fi.kmeans_update(x, labels, -1)

    def test_direct_calls_are_checked(self, device: torch.device) -> None:
        native, x, c = torch.ops.fastif_ext, *to(device, torch.zeros(4, 3), torch.zeros(2, 3))
        labels, weight = to(device, torch.zeros(4, dtype=torch.int64), torch.ones(4).double())
        with pytest.raises(RuntimeError, match="precision must be"):
            native.kmeans_assign(x, c, "half")
        for bad in (c[:, :2], c[0], c[:0], c.double()):
            with pytest.raises(RuntimeError, match="centroids"):
                native.kmeans_assign(x, bad)
        with pytest.raises(RuntimeError, match="labels"):
            native.kmeans_update(x, labels[:3], 2)
        with pytest.raises(RuntimeError, match="weight"):
            native.kmeans_update(x, labels, 2, weight)
        with pytest.raises(RuntimeError, match="k must not be negative"):
            native.kmeans_nearest(x, c, -1)
        with pytest.raises(RuntimeError, match="k must not be negative"):
            native.kmeans_weighted(x, c, -1, 0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_opcheck(self, dtype: torch.dtype, device: torch.device) -> None:
        native = torch.ops.fastif_ext
        x, c = to(device, *case(20, 6, 3, dtype))
        labels, sqdist = fi.kmeans_assign(x, c)
        torch.library.opcheck(native.kmeans_assign, (x, c))
        torch.library.opcheck(native.kmeans_assign, (x, c, "fp32"))
        torch.library.opcheck(native.kmeans_update, (x, labels, 3))
        torch.library.opcheck(native.kmeans_update, (x, labels, 3, sqdist))
        torch.library.opcheck(native.kmeans_nearest, (x, c, 4))
        torch.library.opcheck(native.kmeans_weighted, (x, c, 4, 1))
        torch.library.opcheck(native.kmeans_candidates, (x, c, sqdist, sqdist))
        torch.library.opcheck(native.kmeans_candidates, (x, c, sqdist))

    def test_compile(self) -> None:
        x, c = case(200, 6, 3)

        def step(x: Tensor, c: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            labels, sqdist = fi.kmeans_assign(x, c)
            sums, counts = fi.kmeans_update(x, labels, c.shape[0], weight=weight)
            nearest = fi.kmeans_nearest(x, c, 4)
            drawn = fi.kmeans_weighted(x, c, 4, seed=2)
            tried = ops.kmeans_candidates(x, c, sqdist, weight=weight)
            return *tried, labels, sqdist, sums, counts, *nearest, drawn

        want = step(x, c, x[:, 0])
        got = torch.compile(step, fullgraph=True)(x, c, x[:, 0])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
