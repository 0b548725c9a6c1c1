"""Sampling on a GPU: the CPU's rows and keys bit for bit, its errors, streams, graphs, size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastif_ext as fi

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def odd_logits(n: int, Y: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """With -inf, NaN, rows of -inf, and values far below float's exp."""
    g = torch.Generator().manual_seed(n * Y)
    logits = 3 * torch.randn(n, Y, generator=g, dtype=torch.float64)
    logits[torch.rand(n, Y, generator=g) < 0.1] = -INF
    logits[torch.rand(n, Y, generator=g) < 0.1] -= 150
    logits[3::17, :1] = NAN
    logits[5::19] = -INF
    return logits.to(dtype)


def assert_identical(gpu: fi.ClassSample, cpu: fi.ClassSample) -> None:
    for name, got, want in zip(cpu._fields, gpu, cpu, strict=True):
        assert got.is_cuda
        assert torch.equal(got.cpu(), want), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize(
    ("n", "Y", "k", "row_offset"),
    [
        (6000, 10, 20, 0),
        (200_000, 10, 160, 5),
        (700, 33, 5, 2**40),
        (20_000, 100, 100, 1),
        (90, 3, 100, 1),
        (40, 1000, 3, 9),
        (5, 9000, 3, 0),
        (0, 4, 2, 0),
        (4, 0, 2, 0),
        (50, 4, 0, 0),
    ],
)
def test_class_multinomial(
    n: int, Y: int, k: int, row_offset: int, replacement: bool, dtype: torch.dtype
) -> None:
    logits = odd_logits(n, Y, dtype)
    options = {"replacement": replacement, "seed": -12345, "row_offset": row_offset}
    got = fi.class_multinomial(logits.cuda(), k, **options)
    assert_identical(got, fi.class_multinomial(logits, k, **options))


def misleading(n: int, kind: str) -> Tensor:
    """Logits whose sizes a probe of some rows judges wrongly: the fallback has to be exact."""
    logits = torch.zeros(n, 4)
    i = torch.arange(n)
    if kind == "all in one row":
        logits[:, 0] = -60
        logits[n // 2 + 1, 0] = 60
    elif kind == "growing":
        logits[:, 0] = 40.0 * i / n - 40
    elif kind == "probed rows are light":
        logits[:, 0] = torch.where(i % 64 < 4, -30.0, 0.0)
    elif kind == "probed rows are heavy":
        logits[:, 0] = torch.where(i % 64 < 4, 0.0, -30.0)
    return logits


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["equal", "all in one row", "growing", "probed rows are light", "probed rows are heavy"],
)
def test_sizes_that_mislead_a_probe(kind: str, replacement: bool) -> None:
    logits = misleading(100_000, kind)
    got = fi.class_multinomial(logits.cuda(), 50, seed=1, replacement=replacement)
    assert_identical(got, fi.class_multinomial(logits, 50, seed=1, replacement=replacement))


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("layout", ["lines", "transposed", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bottom_k(layout: str, replacement: bool, dtype: torch.dtype) -> None:
    w = torch.rand(7, 30_000, generator=torch.Generator().manual_seed(0)).square()
    w[:, ::5] = 0
    w = w.to(dtype)
    if layout == "transposed":
        w = w.T.contiguous().T
    elif layout == "strided":
        w = w[::2, ::3]
    gpu = torch.empty_strided(w.shape, w.stride(), dtype=dtype, device="cuda").copy_(w)
    options = {"seed": 3, "replacement": replacement, "row_offset": 11}
    assert_identical_without_skipped(fi.bottom_k(gpu, 40, **options), fi.bottom_k(w, 40, **options))
    assert torch.equal(
        fi.multinomial(gpu, 9, replacement, seed=5).cpu(), fi.multinomial(w, 9, replacement, seed=5)
    )


def assert_identical_without_skipped(gpu: fi.ClassSample, cpu: fi.ClassSample) -> None:
    assert all(torch.equal(a.cpu(), b) for a, b in zip(gpu[:3], cpu[:3], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "Y", "m"), [(50_000, 10, 400), (300, 1500, 20), (40, 3, 100), (0, 3, 5), (30, 0, 5)]
)
def test_curvature(n: int, Y: int, m: int, dtype: torch.dtype) -> None:
    logits = odd_logits(n, Y, dtype)
    scale = torch.rand(n, generator=torch.Generator().manual_seed(1))
    sizes = fi.curvature_sizes(logits.cuda(), row_scale=scale.cuda())
    assert torch.equal(sizes.cpu(), fi.curvature_sizes(logits, row_scale=scale))
    options = {"floor": 0.01, "seed": 8, "row_offset": 3}
    got = fi.curvature_multinomial(logits.cuda(), m, row_scale=scale.cuda(), **options)
    assert_identical(got, fi.curvature_multinomial(logits, m, row_scale=scale, **options))


@pytest.mark.parametrize("parts", [2, 5])
def test_chunks_merge_to_the_whole(parts: int) -> None:
    logits = odd_logits(9000, 12).cuda()
    whole = fi.class_multinomial(logits, 30, seed=4)
    merged, offset = None, 0
    for chunk in logits.chunk(parts):
        part = fi.class_multinomial(chunk, 30, seed=4, row_offset=offset)
        merged = part if merged is None else fi.merge_samples(merged, part)
        offset += len(chunk)
    assert merged is not None
    assert_identical(merged, fi.ClassSample(*(t.cpu() for t in whole)))


def test_errors_are_the_cpu_s() -> None:
    logits = torch.zeros(50_000, 3)
    logits[[41, 40_000], 2] = INF
    scale = torch.ones(100)
    scale[7] = -1
    weights = torch.ones(3, 1000)
    weights[1, 77] = NAN
    few = torch.zeros(2, 100)
    few[:, :3] = 1
    few[1, 2] = 0
    calls: list[Callable[[str], object]] = [
        lambda d: fi.class_multinomial(logits.to(d), 2, seed=0),
        lambda d: fi.curvature_sizes(logits.to(d)),
        lambda d: fi.curvature_multinomial(logits.to(d), 2, seed=0),
        lambda d: fi.curvature_sizes(torch.zeros(100, 3, device=d), row_scale=scale.to(d)),
        lambda d: fi.curvature_multinomial(
            torch.zeros(100, 3, device=d), 2, row_scale=scale.to(d), seed=0
        ),
        lambda d: fi.bottom_k(weights.to(d), 2, seed=0),
        lambda d: fi.multinomial(weights.to(d), 2, seed=0),
        lambda d: fi.multinomial(few.to(d), 3, seed=0),
    ]
    for call in calls:
        messages = []
        for device in ("cpu", "cuda"):
            with pytest.raises(RuntimeError) as error:
                call(device)
            messages.append(str(error.value).splitlines()[0])
        assert messages[1] in messages[0]


def operators() -> list[Callable[[], tuple[Tensor, ...]]]:
    logits, weights = odd_logits(9000, 12).cuda(), torch.rand(5, 9000, device="cuda")
    a = fi.class_multinomial(logits[:4000], 9, seed=1)
    b = fi.class_multinomial(logits[4000:], 9, seed=1, row_offset=4000)
    return [
        lambda: fi.class_multinomial(logits, 9, seed=1),
        lambda: fi.class_multinomial(logits, 9, seed=1, replacement=True),
        lambda: fi.bottom_k(weights, 9, seed=1),
        lambda: (fi.curvature_sizes(logits),),
        lambda: fi.curvature_multinomial(logits, 9, seed=1),
        lambda: fi.merge_samples(a, b),
    ]


@pytest.mark.parametrize("which", range(6))
def test_stream_and_repeatability(which: int) -> None:
    call = operators()[which]
    want = [t.clone() for t in call()]
    assert all(torch.equal(x, y) for x, y in zip(call(), want, strict=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = [t.clone() for t in call()]
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("which", range(6))
def test_in_a_cuda_graph(which: int) -> None:
    call = operators()[which]
    want = [t.clone() for t in call()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for _ in range(2):
        for t in results:
            t.zero_()
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(results, want, strict=True))


def test_bad_values_in_a_cuda_graph_mark_the_results() -> None:
    logits = torch.zeros(500, 3, device="cuda")
    fi.class_multinomial(logits, 4, seed=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample = fi.class_multinomial(logits, 4, seed=0)
    logits[17, 1] = INF
    graph.replay()
    assert sample.skipped.tolist() == [-18]
    assert (sample.rows == -1).all()
    assert sample.log_keys.isnan().all()
    assert sample.log_threshold.isnan().all()


def test_seed_from_a_generator_of_the_gpu() -> None:
    logits = odd_logits(500, 5).cuda()
    draws = [
        fi.class_multinomial(logits, 5, generator=torch.Generator("cuda").manual_seed(s)).rows
        for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def need_memory(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, {free / 1e9:.0f} are free")


def test_more_rows_than_2_to_the_24() -> None:
    """torch.multinomial refuses this many."""
    need_memory(4)
    n = (1 << 25) + 3
    logits = torch.zeros(n, 2)
    logits[:, 0] = -50
    logits[[5, n - 2], 0] = 0
    want = fi.class_multinomial(logits, 3, seed=0)
    assert_identical(fi.class_multinomial(logits.cuda(), 3, seed=0), want)
    assert {5, n - 2} <= set(want.rows[0].tolist())


def test_more_than_2_to_the_31_elements() -> None:
    """The heavy rows lie beyond 32 bits of elements, and are found."""
    need_memory(12)
    n, Y = (1 << 29) + 1000, 5
    logits = torch.zeros(n, Y, device="cuda", dtype=torch.bfloat16)
    logits[:, 0] = -80
    heavy = torch.tensor([n - 3, n - 500, 7], device="cuda")
    logits[heavy, 0] = 0
    sample = fi.class_multinomial(logits, 3, seed=0)
    assert set(sample.rows[0].tolist()) == set(heavy.tolist())
    assert bool((sample.rows[1:] >= 0).all() & (sample.rows[1:] < n).all())
    assert sample.rows[1:].max() > 2**31 // Y
