"""What only a GPU can show of kmeans_assign: tensor cores, size, streams, graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastif_ext as fi

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def blobs(
    n: int, d: int, K: int, spread: float, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Rows around K centroids on the GPU; with a small spread nearest centroids are far apart."""
    g = torch.Generator("cuda").manual_seed(n + d + K)
    centroids = torch.randn(K, d, generator=g, device="cuda")
    which = torch.randint(K, (n,), generator=g, device="cuda")
    x = centroids[which] + spread * torch.randn(n, d, generator=g, device="cuda")
    return [x.to(dtype), centroids.to(dtype)]


def equals_cpu(x: Tensor, centroids: Tensor) -> None:
    labels, sqdist = fi.kmeans_assign(x, centroids)
    want_labels, want = fi.kmeans_assign(x.cpu(), centroids.cpu())
    assert torch.equal(labels.cpu(), want_labels)
    rtol = 1e-5 if want.dtype == torch.float32 else 1e-13
    torch.testing.assert_close(sqdist.cpu(), want, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(
    ("n", "d", "K"),
    [
        (1, 32, 16),
        (255, 33, 127),
        (257, 34, 128),
        (1000, 64, 129),
        (3000, 771, 257),
        (40_000, 96, 300),
    ],
)
def test_labels_are_those_of_the_cpu(
    n: int, d: int, K: int, spread: float, dtype: torch.dtype
) -> None:
    equals_cpu(*blobs(n, d, K, spread, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_start_at_odd_addresses(dtype: torch.dtype) -> None:
    x, centroids = blobs(600, 40, 50, 1.0, dtype)
    for shift in (1, 2, 3):
        storage = torch.empty(x.numel() + shift, dtype=dtype, device="cuda")
        shifted = storage[shift:].view_as(x)
        shifted.copy_(x)
        equals_cpu(shifted, centroids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e30, 1e19, 300.0, 1e-5, 1e-30])
def test_overflow_and_underflow(scale: float, dtype: torch.dtype) -> None:
    x, centroids = blobs(500, 48, 40, 1.0)
    x, centroids = (x * scale).to(dtype), (centroids * scale).to(dtype)
    labels, _ = fi.kmeans_assign(x, centroids)
    assert torch.equal(labels.cpu(), fi.kmeans_assign(x.cpu(), centroids.cpu())[0])


def test_offset_duplicates_and_bad_rows() -> None:
    x, centroids = blobs(5000, 80, 60, 1.0)
    equals_cpu(x + 1000, centroids + 1000)
    equals_cpu(x, centroids.repeat(3, 1))  # every row has two ties
    x[17, 3], x[4000, 79], centroids[5, 7] = torch.nan, torch.inf, torch.nan
    equals_cpu(x, centroids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tf32_is_nearly_the_best(dtype: torch.dtype) -> None:
    x, centroids = blobs(20_000, 128, 200, 3.0, dtype)
    labels, sqdist = fi.kmeans_assign(x, centroids, precision="tf32")
    exact_labels, exact = fi.kmeans_assign(x, centroids)
    assert (labels == exact_labels).float().mean() > 0.9
    assert (sqdist >= exact * (1 - 1e-5)).all()
    assert (sqdist <= exact * 1.05).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_streams_and_graphs_give_the_same_bits(dtype: torch.dtype) -> None:
    x, centroids = blobs(30_000, 100, 150, 5.0, dtype)
    want = fi.kmeans_assign(x, centroids)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = fi.kmeans_assign(x, centroids)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fi.kmeans_assign(x, centroids)
    graph.replay()
    for got in (again, captured):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    x.copy_(x.flip(0))
    graph.replay()
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(captured, want, strict=True))


def test_chunks_change_no_bit() -> None:
    x, centroids = blobs(30_000, 100, 150, 5.0)
    want = fi.kmeans_assign(x, centroids)
    parts = [fi.kmeans_assign(part, centroids) for part in x.split(777)]
    assert torch.equal(torch.cat([p[0] for p in parts]), want[0])
    assert torch.equal(torch.cat([p[1] for p in parts]), want[1])


@pytest.mark.parametrize(("n", "d", "dtype"), [
    (2**24 + 300, 32, torch.float32),  # more than 2^16 row tiles
    (2**24 + 300, 130, torch.bfloat16),  # more than 2^31 elements
])  # fmt: skip
def test_many_rows(n: int, d: int, dtype: torch.dtype) -> None:
    _, centroids = blobs(1, d, 20, 1.0, dtype)
    x = torch.empty(n, d, dtype=dtype, device="cuda")
    for part in x.split(2**20):
        part.normal_()
    labels, sqdist = fi.kmeans_assign(x, centroids)
    for begin in (0, 2**23 + 5, n - 1000):
        rows = slice(begin, begin + 1000)
        want_labels, want = fi.kmeans_assign(x[rows].cpu(), centroids.cpu())
        assert torch.equal(labels[rows].cpu(), want_labels)
        torch.testing.assert_close(sqdist[rows].cpu(), want, rtol=1e-5, atol=0)


def test_many_centroids() -> None:
    equals_cpu(*blobs(300, 40, 70_001, 1.0))
