"""The k-means operators on a GPU: the CPU's results, large sizes, streams and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastif_ext as fi
from fastif_ext import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize("device", ["cuda"], indirect=True),
]


def equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))


def calls(device: torch.device) -> list[Callable[[], tuple[Tensor, ...]]]:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(20_000, 24, generator=g).to(device)
    c, sqdist = x[:50].clone(), torch.full((20_000,), 30.0, device=device)
    labels = torch.randint(-1, 50, (20_000,), generator=g).to(device)
    return [
        lambda: fi.kmeans_update(x, labels, 50),
        lambda: fi.kmeans_update(x, labels, 50, weight=x[:, 0].contiguous()),
        lambda: fi.kmeans_nearest(x, c, 30),
        lambda: (fi.kmeans_weighted(x, c, 30, seed=9),),
        lambda: ops.kmeans_candidates(x, c[:9], sqdist, weight=x[:, 1].square().contiguous()),
    ]


def test_second_call_and_other_stream_give_the_same_bits(device: torch.device) -> None:
    for call in calls(device):
        want = call()
        assert equal(call(), want)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            got = call()
        stream.synchronize()
        assert equal(got, want)


def captured(call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for result in results:
        result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return results


def test_cuda_graph(device: torch.device) -> None:
    for call in calls(device):
        want = call()
        torch.cuda.synchronize()
        assert equal(captured(call), want)


def test_labels_out_of_range_in_a_cuda_graph(device: torch.device) -> None:
    """A graph cannot raise: the results are poisoned."""
    x = torch.zeros(5000, 3, device=device)
    labels = torch.zeros(5000, dtype=torch.int64, device=device)
    fi.kmeans_update(x, labels, 2)  # kernels are loaded before a capture
    labels[4000] = 2
    torch.cuda.synchronize()
    sums, counts = captured(lambda: fi.kmeans_update(x, labels, 2))
    assert sums.isnan().all()
    assert counts.tolist() == [-1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "d", "K"), [(2**24 + 5, 2, 3), (300_000, 5, 100_000), (70_000, 260, 70), (100_000, 64, 1)]
)
def test_update_has_the_bits_of_the_cpu(
    n: int, d: int, K: int, dtype: torch.dtype, device: torch.device
) -> None:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=g).to(dtype)
    labels = (torch.rand(n, generator=g).square() * (K + 1)).long() - 1
    want = fi.kmeans_update(x, labels, K)
    assert equal(fi.kmeans_update(x.to(device), labels.to(device), K), want)


def test_more_than_2_31_elements(device: torch.device) -> None:
    """Small whole numbers, whose sums float32 holds exactly."""
    n, d = 2**25 + 3, 65
    value = torch.arange(n, device=device) % 3
    x = value.float()[:, None].expand(n, d).contiguous()
    labels = torch.arange(n, device=device) % 5
    sums, counts = fi.kmeans_update(x, labels, 5)
    want = torch.bincount(labels, weights=value.double(), minlength=5)
    assert torch.equal(sums, want.float()[:, None].expand(5, d))
    assert torch.equal(counts, labels.bincount(minlength=5))
    sqdist = torch.full((n,), 100.0, device=device)
    least, potential = ops.kmeans_candidates(x, torch.zeros(2, d, device=device), sqdist)
    assert torch.equal(least[1], (d * value.square()).clamp(max=100).float())
    assert torch.equal(potential, least.double().sum(1))


def test_as_many_distances_as_2_31(device: torch.device) -> None:
    """The offsets of a candidate's distances go beyond 32 bits."""
    n, L = 2**24 + 1, 130
    x = (torch.arange(n, device=device) % 7).float()[:, None]
    candidates = torch.arange(L, device=device).float()[:, None]
    least, _ = ops.kmeans_candidates(x, candidates, torch.full((n,), 1e6, device=device))
    assert torch.equal(least[L - 1], (L - 1 - x[:, 0]).square())


def test_same_rows_as_the_cpu(device: torch.device) -> None:
    """One column: distances have one rounding, the same everywhere."""
    x = torch.randn(2**24 + 77, 1)
    centroids = torch.tensor([[-1.0], [0.0], [1.5]])
    on_gpu = x.to(device), centroids.to(device)
    assert equal(fi.kmeans_nearest(*on_gpu, 100), fi.kmeans_nearest(x, centroids, 100))
    for seed in (0, -1):
        want = fi.kmeans_weighted(x, centroids, 100, seed=seed)
        assert torch.equal(fi.kmeans_weighted(*on_gpu, 100, seed=seed).cpu(), want)


def test_many_clusters(device: torch.device) -> None:
    x = torch.randn(80_000, 1)
    centroids = x[:70_000].sort(0).values
    index, sqdist = fi.kmeans_nearest(x.to(device), centroids.to(device), 3)
    assert equal((index, sqdist), fi.kmeans_nearest(x, centroids, 3))
