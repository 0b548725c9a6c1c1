"""What only a GPU can show of the curvature operators: size, streams, graphs, repeatability."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastif_ext as fi
from fastif_ext import reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

Call = Callable[[], tuple[Tensor, ...]]


def lissa() -> Call:
    h0, v = torch.randn(2, 3, 50_001, device="cuda")
    hvp = [torch.randn(3, 50_000, device="cuda"), torch.randn(3, 1, device="cuda")]
    h = torch.empty_like(h0)

    def call() -> tuple[Tensor, ...]:
        h.copy_(h0)
        return h, *fi.lissa_update_(h, v, hvp, damping=0.1, scale=2.0)

    return call


def accumulate() -> Call:
    start, product = torch.randn(2, 3, 50_001, device="cuda")
    acc = torch.empty_like(start)

    def call() -> tuple[Tensor, ...]:
        return (fi.hvp_accumulate_(acc.copy_(start), [product], 0.3),)

    return call


def softmax() -> Call:
    p, z = torch.rand(4001, 37, device="cuda"), torch.randn(3, 4001, 37, device="cuda")
    return lambda: (fi.softmax_hvp(p, z),)


def linear_softmax() -> Call:
    x, p = torch.randn(4001, 65, device="cuda"), torch.rand(4001, 37, device="cuda")
    v = torch.randn(3, 37, 66, device="cuda")
    return lambda: (fi.linear_softmax_hvp(x, p, v),)


CALLS = pytest.mark.parametrize("make", [lissa, accumulate, softmax, linear_softmax])


def copies(results: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.clone() for t in results]


@CALLS
def test_twice_the_same_bits(make: Callable[[], Call]) -> None:
    call = make()
    first = copies(call())
    assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))


@CALLS
def test_on_a_stream_of_its_own(make: Callable[[], Call]) -> None:
    call = make()
    want = copies(call())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what is launched elsewhere would finish before this
        got = copies(call())
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@CALLS
def test_in_a_cuda_graph(make: Callable[[], Call]) -> None:
    call = make()
    want = copies(call())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # libraries set themselves up outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for _ in range(2):
        for t in results:
            t.zero_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True))


def need_memory(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, {free / 1e9:.0f} are free")


def test_lissa_update_beyond_32_bits() -> None:
    """More than 2^31 elements; the last ones are checked against the twin."""
    need_memory(32)
    p = (1 << 31) + 12_345
    h, v = torch.zeros(1, p, device="cuda"), torch.zeros(1, p, device="cuda")
    product = torch.zeros(1, p, device="cuda")
    for t, value in ((h, 1.0), (v, 2.0), (product, 4.0)):
        t[0, -1000:] = value
    step = fi.lissa_update_(h, v, [product], damping=0.5, scale=2.0)
    value = 2 + 0.75 - 2
    assert bool((h[0, -1000:] == value).all())
    assert bool((h[0, :-1000] == 0).all())
    torch.testing.assert_close(step.norm_sq.item(), 1000 * value**2)
    torch.testing.assert_close(step.delta_sq.item(), 1000 * (value - 1) ** 2)


def test_softmax_hvp_beyond_32_bits() -> None:
    need_memory(30)
    n, C = (1 << 28) + 77, 9
    p, z = torch.zeros(n, C, device="cuda"), torch.zeros(n, C, device="cuda")
    p[-500:], z[-500:] = torch.rand(500, C, device="cuda"), torch.randn(500, C, device="cuda")
    u = fi.softmax_hvp(p, z)
    torch.testing.assert_close(u[-500:], reference.softmax_hvp(p[-500:], z[-500:]))
    assert bool((u[:-500] == 0).all())


def test_many_small_parameters() -> None:
    """More tensors than one launch takes, at addresses that no vector load could use."""
    hvp = [torch.randn(2, 3 + i % 5, device="cuda") for i in range(250)]
    p = sum(t.shape[1] for t in hvp)
    h, v = torch.randn(2, 2, p, device="cuda")
    want_h = h.clone()
    want = reference.lissa_update_(want_h, v, hvp, damping=0.3, scale=7.0)
    step = fi.lissa_update_(h, v, hvp, damping=0.3, scale=7.0)
    torch.testing.assert_close(h, want_h)
    for got, expected in zip(step, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_linear_softmax_hvp_as_on_the_cpu() -> None:
    x, p, v = torch.randn(301, 19), torch.rand(301, 7), torch.randn(2, 7, 20)
    got = fi.linear_softmax_hvp(x.cuda(), p.cuda(), v.cuda())
    torch.testing.assert_close(got.cpu(), fi.linear_softmax_hvp(x, p, v), rtol=1e-4, atol=1e-3)
