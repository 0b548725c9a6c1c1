"""Samples of chunks merge into the sample of the whole, and threads change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import fastif_ext as fi
from fastif_ext import reference

Draw = Callable[[Tensor, int], fi.ClassSample]


def logits_of(n: int, Y: int, seed: int = 0) -> Tensor:
    """Logits with -inf, NaN, and rows of -inf."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, Y, generator=g)
    logits[torch.rand(n, Y, generator=g) < 0.1] = -float("inf")
    logits[3::17, :1] = float("nan")
    logits[5::19] = -float("inf")
    return logits


def assert_identical(a: fi.ClassSample, b: fi.ClassSample) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def draws() -> Iterator[tuple[str, Draw]]:
    """Every streamed operator as draw(chunk, row_offset)."""
    for r in (False, True):
        yield (
            f"class_multinomial-{r}",
            lambda x, o, r=r: fi.class_multinomial(x, 40, replacement=r, seed=6, row_offset=o),
        )
        yield (
            f"bottom_k-{r}",
            lambda x, o, r=r: fi.bottom_k(
                torch.softmax(x, 1).nan_to_num(0).t(), 40, replacement=r, seed=6, row_offset=o
            ),
        )
    yield (
        "curvature",
        lambda x, o: fi.curvature_multinomial(x, 40, floor=0.1, seed=6, row_offset=o),
    )


@pytest.mark.parametrize("draw", [pytest.param(d, id=name) for name, d in draws()])
class TestStreaming:
    def test_any_split_and_order_gives_the_whole(self, draw: Draw) -> None:
        logits = logits_of(3000, 12)
        whole = draw(logits, 100)
        g = torch.Generator().manual_seed(3)
        for _ in range(8):
            cuts = [0, *torch.randint(0, 3001, (4,), generator=g).sort().values.tolist(), 3000]
            parts = [draw(logits[a:b], 100 + a) for a, b in pairwise(cuts)]
            merged = parts.pop(int(torch.randint(5, (), generator=g)))
            for i in torch.randperm(4, generator=g).tolist():
                merged = fi.merge_samples(merged, parts[i])
            assert_identical(merged, whole)

    def test_threads_change_no_bit(self, draw: Draw, threads: None) -> None:
        logits = logits_of(60_000, 12)
        results = []
        for n in (1, 2, 2, 3):
            torch.set_num_threads(n)
            results.append(draw(logits, 0))
        for other in results[1:]:
            assert_identical(results[0], other)


class TestMerge:
    def test_equals_twin_and_commutes(self) -> None:
        a, b = (
            fi.class_multinomial(logits_of(50, 6, seed=s), 9, seed=1, row_offset=50 * s)
            for s in (0, 1)
        )
        short = fi.class_multinomial(logits_of(4, 6), 9, seed=1, row_offset=1000)
        for x, y in ((a, b), (a, short), (short, short._replace(rows=short.rows))):
            got = fi.merge_samples(x, y)
            want = reference.merge_samples(x[:3], y[:3])
            assert all(torch.equal(p, q) for p, q in zip(got[:3], want, strict=True))
            assert_identical(got, fi.merge_samples(y, x))
        pool = fi.bottom_k(torch.rand(20), 0, seed=0)
        assert fi.merge_samples(pool, pool).rows.shape == (0,)

    def test_equal_keys_go_by_row_id(self) -> None:
        def sample(rows: list[int]) -> fi.ClassSample:
            keys, zero = torch.tensor([2.0, 1.0]), torch.zeros(1, dtype=torch.int64)
            return fi.ClassSample(torch.tensor(rows), keys, torch.tensor(0.5), zero)

        merged = fi.merge_samples(sample([8, 1]), sample([4, 9]))
        assert merged.rows.tolist() == [4, 8]
        assert merged.log_threshold == 1.0

    def test_bad_input(self) -> None:
        a, b = fi.bottom_k(torch.rand(9), 2, seed=0), fi.bottom_k(torch.rand(9), 3, seed=0)
        with pytest.raises(ValueError, match=r"a has shape \[2\], b has \[3\]"):
            fi.merge_samples(a, b)
        with pytest.raises(TypeError, match="b must be a ClassSample, got tuple"):
            fi.merge_samples(a, tuple(b))
        with pytest.raises(ValueError, match="do not fit together"):
            fi.merge_samples(a._replace(log_keys=b.log_keys), b)
