"""The laws of the sampling operators: exact probabilities, unbiasedness, torch.multinomial.

Seeds are fixed, so a test that passes once always does; the false-alarm rates say how likely a
right implementation was to fail for a new seed.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats
from torch import Tensor

import fastif_ext as fi

FALSE_ALARM = 1e-4  # of every chi-square test below


def successive_probabilities(p: Tensor, k: int) -> dict[tuple[int, ...], float]:
    """The probability of every ordered sample of successive sampling without replacement."""
    out = {}
    for order in itertools.permutations(range(len(p)), k):
        left, probability = float(p.sum()), 1.0
        for i in order:
            probability *= float(p[i]) / left
            left -= float(p[i])
        out[order] = probability
    return out


def assert_follows(counts: Tensor, probabilities: Tensor) -> None:
    """Chi-square goodness of fit at FALSE_ALARM."""
    expected = probabilities / probabilities.sum() * counts.sum()
    assert expected.min() > 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(float(statistic), len(counts) - 1) > FALSE_ALARM


def many(p: Tensor, k: int, draws: int, *, replacement: bool = False) -> Tensor:
    """`draws` independent samples of the line p: lines of one bottom_k, [draws, k]."""
    return fi.bottom_k(p.expand(draws, -1), k, replacement=replacement, seed=20).rows


def test_ordered_samples_follow_successive_sampling() -> None:
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    law = successive_probabilities(p, 3)
    place = {order: i for i, order in enumerate(law)}
    counts = torch.zeros(len(law))
    for order in many(p, 3, 20_000).tolist():
        counts[place[tuple(order)]] += 1
    assert_follows(counts, torch.tensor(list(law.values())))


@pytest.mark.parametrize("classes", [3, 17])
def test_class_samples_follow_successive_sampling(classes: int) -> None:
    """The sample of each class, over seeds: the law for its own column of the softmax."""
    logits = torch.randn(5, classes)
    p = torch.softmax(logits.double(), 1)
    laws = [successive_probabilities(p[:, y], 2) for y in range(3)]
    counts = [dict.fromkeys(law, 0) for law in laws]
    for seed in range(4000):
        rows = fi.class_multinomial(logits, 2, seed=seed).rows
        for y in range(3):
            counts[y][tuple(rows[y].tolist())] += 1
    for law, count in zip(laws, counts, strict=True):
        likely = [order for order in law if law[order] * 4000 > 6]
        rest = sum(law.values()) - sum(law[o] for o in likely)
        observed = [count[o] for o in likely] + [4000 - sum(count[o] for o in likely)]
        expected = [law[o] for o in likely] + [rest]
        if rest * 4000 < 6:  # too few for a chi-square: leave them out
            observed, expected = observed[:-1], expected[:-1]
        assert_follows(torch.tensor(observed).float(), torch.tensor(expected))


@pytest.mark.parametrize("replacement", [False, True])
def test_frequencies_agree_with_torch_multinomial(replacement: bool) -> None:
    """Two-sample chi-square on how often each position is drawn first, and at all."""
    p = torch.rand(40) ** 2 + 0.02
    ours = many(p, 6, 30_000, replacement=replacement)
    theirs = torch.multinomial(p.expand(30_000, -1), 6, replacement=replacement)
    assert torch.equal(torch.tensor(ours.shape), torch.tensor(theirs.shape))
    a, b = (x[:, 0].bincount(minlength=40).double() for x in (ours, theirs))
    assert stats.chi2.sf(float(((a - b) ** 2 / (a + b)).sum()), 39) > FALSE_ALARM
    a, b = (x.flatten().bincount(minlength=40).double() for x in (ours, theirs))
    # Without replacement counts vary less than binomially, so the test is conservative there.
    assert stats.chi2.sf(float(((a - b) ** 2 / (a + b)).sum()), 39) > FALSE_ALARM


def test_draws_with_replacement_are_independent_in_order() -> None:
    """Every ordered triple has the product probability; a position may come again."""
    p = torch.tensor([0.5, 0.3, 0.2])
    rows = many(p, 3, 30_000, replacement=True)
    triple = rows[:, 0] * 9 + rows[:, 1] * 3 + rows[:, 2]
    law = torch.einsum("i,j,k->ijk", p, p, p).flatten()
    assert_follows(triple.bincount(minlength=27).float(), law)
    long = fi.bottom_k(p, 30_000, replacement=True, seed=1).rows
    assert_follows(long.bincount(minlength=3).float(), p)
    pair = long[:-1:2] * 3 + long[1::2]
    assert_follows(pair.bincount(minlength=9).float(), torch.outer(p, p).flatten())


def test_horvitz_thompson_is_unbiased() -> None:
    """Weighted by 1 / inclusion_probability, sample sums estimate full sums (4.5 sigma: 7e-6)."""
    n, m, repeats = 400, 20, 4000
    logits = 4 * torch.randn(n, 5)
    sizes = 0.05 + fi.curvature_sizes(logits)
    value = torch.randn(n) * sizes + 0.1
    estimates = torch.empty(repeats, dtype=torch.float64)
    for seed in range(repeats):
        sample = fi.curvature_multinomial(logits, m, floor=0.05, seed=seed)
        probability = fi.inclusion_probability(sizes[sample.rows].double(), sample.log_threshold)
        estimates[seed] = (value[sample.rows] / probability).sum()
    error = (estimates.mean() - value.double().sum()) / (estimates.std() / repeats**0.5)
    assert abs(error) < 4.5
    assert abs(estimates.mean() / value.sum() - 1) < 0.2  # the test has power


def test_class_horvitz_thompson_is_unbiased() -> None:
    n, k, repeats = 300, 10, 3000
    logits = 2 * torch.randn(n, 3)
    p = torch.softmax(logits.double(), 1).t()
    value = torch.rand(n, dtype=torch.float64)
    estimates = torch.empty(repeats, 3, dtype=torch.float64)
    for seed in range(repeats):
        sample = fi.class_multinomial(logits, k, seed=seed)
        probability = fi.inclusion_probability(
            p.gather(1, sample.rows), sample.log_threshold[:, None]
        )
        estimates[seed] = (value[sample.rows] / probability).sum(1)
    error = (estimates.mean(0) - value.sum()) / (estimates.std(0) / repeats**0.5)
    assert error.abs().max() < 4.5


def test_inclusion_probability() -> None:
    size = torch.tensor([1e-12, 0.5, 1e9], dtype=torch.float64)
    got = fi.inclusion_probability(size, torch.tensor(0.0))
    torch.testing.assert_close(
        got, torch.tensor([1e-12, 1 - 0.5**0.5, 1.0]).double(), atol=0.2, rtol=0
    )
    assert got[0] == pytest.approx(1e-12, rel=1e-9)
    none = fi.inclusion_probability(size, torch.tensor(float("-inf")))
    assert none.tolist() == [1, 1, 1]
    assert fi.inclusion_probability(size.half(), torch.tensor(0.0)).dtype == torch.float32


def test_uniforms_are_uniform_and_distinct() -> None:
    """First keys of a million elements: uniform in 1000 bins; the tail is not quantised."""
    n = 1_000_000
    sample = fi.bottom_k(torch.ones(n), n, seed=3)
    u = -torch.expm1(-torch.exp(-sample.log_keys.double()))
    assert_follows(
        (u * 1000).long().clamp(max=999).bincount(minlength=1000).float(), torch.ones(1000)
    )
    assert sample.rows.unique().numel() == n
    # The smallest of 1e6 uniforms is near 1e-6, far below float32's 6e-8 steps near 1.
    assert u[:1000].unique().numel() > 990
    torch.testing.assert_close(u[999].item(), 1e-3, rtol=0.15, atol=0)  # sd 3 %: 5 sigma


class TestMultinomial:
    @pytest.mark.parametrize("replacement", [False, True])
    def test_shapes_and_support(self, replacement: bool) -> None:
        w = torch.rand(4, 30).masked_fill(torch.rand(4, 30) < 0.5, 0)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            got = fi.multinomial(w.to(dtype), 5, replacement, seed=1)
            assert (got.shape, got.dtype) == ((4, 5), torch.int64)
            assert (w.gather(1, got) > 0).all()
        assert fi.multinomial(w[0], 5, replacement).shape == (5,)
        assert fi.multinomial(w[:0], 5, replacement).shape == (0, 5)

    def test_generator(self) -> None:
        w = torch.rand(1000)
        a, b = (fi.multinomial(w, 9, generator=torch.Generator().manual_seed(2)) for _ in range(2))
        assert torch.equal(a, b)

    def test_errors_where_torch_has_them(self) -> None:
        for bad in (-1.0, float("nan"), float("inf")):
            w = torch.tensor([1.0, bad])
            for f in (torch.multinomial, fi.multinomial):
                with pytest.raises(RuntimeError):
                    f(w, 1)
        for f in (torch.multinomial, fi.multinomial):
            with pytest.raises(RuntimeError):
                f(torch.zeros(3), 1)
            with pytest.raises(RuntimeError):
                f(torch.tensor([[1.0, 1], [0, 0]]), 1, True)
            with pytest.raises((RuntimeError, ValueError)):
                f(torch.ones(3), 4)
            with pytest.raises((RuntimeError, ValueError)):
                f(torch.ones(3), 0)
            with pytest.raises((RuntimeError, TypeError)):
                f(torch.ones(3, dtype=torch.int64), 1)
        with pytest.raises(RuntimeError, match="fewer positive weights than the 2 draws"):
            fi.multinomial(torch.tensor([0.0, 1.0, 0.0]), 2)
        with pytest.raises(ValueError, match="num_samples must be at least 1"):
            fi.multinomial(torch.ones(3), 0)


class TestWeightedRandomSampler:
    def test_is_called_like_torchs(self) -> None:
        theirs = torch.utils.data.WeightedRandomSampler([1.0, 0.0, 3.0], 4)
        ours = fi.WeightedRandomSampler([1.0, 0.0, 3.0], 4)
        assert len(ours) == len(theirs) == 4
        first = list(ours)
        assert all(type(i) is int for i in first)
        assert set(first) <= {0, 2}
        assert sorted(fi.WeightedRandomSampler(torch.ones(5), 5, False)) == [0, 1, 2, 3, 4]
        loader = torch.utils.data.DataLoader(torch.arange(3), batch_size=2, sampler=ours)
        assert sum(len(batch) for batch in loader) == 4
        for bad in (0, -1, 1.5, True):
            for cls in (torch.utils.data.WeightedRandomSampler, fi.WeightedRandomSampler):
                with pytest.raises(ValueError, match="num_samples"):
                    cls([1.0], bad)
        for cls in (torch.utils.data.WeightedRandomSampler, fi.WeightedRandomSampler):
            with pytest.raises(ValueError, match="replacement"):
                cls([1.0], 1, 1)
            with pytest.raises(ValueError, match="weights"):
                cls([[1.0]], 1)

    def test_generator_and_passes(self) -> None:
        w = torch.rand(1000)
        a, b = (
            fi.WeightedRandomSampler(w, 20, generator=torch.Generator().manual_seed(1))
            for _ in "ab"
        )
        assert list(a) == list(b)
        assert list(a) != list(
            fi.WeightedRandomSampler(w, 20, generator=torch.Generator().manual_seed(1))
        )

    @pytest.mark.parametrize("replacement", [False, True])
    def test_more_rows_than_2_to_the_24(self, replacement: bool) -> None:
        n = 2**24 + 10
        weights = torch.full((n,), 1e-9)
        weights[-8:] = 1e6
        rows = set(fi.WeightedRandomSampler(weights, 8, replacement))
        assert rows <= set(range(n - 8, n))
        assert len(rows) == 8 or replacement
