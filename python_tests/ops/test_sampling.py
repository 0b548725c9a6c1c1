"""Contracts of the sampling operators, against their pure-PyTorch twins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastif_ext as fi
from fastif_ext import reference
from fastif_ext.reference import sampling as twin

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def case(n: int, Y: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Logits with every oddity but +inf: -inf, NaN, rows of -inf, values far below float's exp."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, Y, generator=g, dtype=torch.float64)
    logits[torch.rand(n, Y, generator=g) < 0.1] = -INF
    logits[torch.rand(n, Y, generator=g) < 0.1] -= 150
    logits[3::17, :1] = NAN
    logits[5::19] = -INF
    return logits.to(dtype)


def assert_same(got: fi.ClassSample, want: tuple[Tensor, ...]) -> None:
    """Rows equal; keys within the one float32 rounding that double arithmetic leaves open."""
    assert torch.equal(got.rows, want[0])
    torch.testing.assert_close(got.log_keys, want[1], rtol=2e-7, atol=2e-7)
    torch.testing.assert_close(got.log_threshold, want[2], rtol=2e-7, atol=2e-7)


def assert_identical(a: fi.ClassSample, b: fi.ClassSample) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_philox_known_answers() -> None:
    """kat_vectors of the Random123 distribution."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    words = twin.philox4x32([torch.tensor([c]) for c in pi], (0xA4093822, 0x299F31D0))
    assert [int(w) for w in words] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


class TestClassMultinomial:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("replacement", [False, True])
    @pytest.mark.parametrize(
        ("n", "Y", "k", "row_offset"),
        [
            (6000, 10, 20, 0),
            (700, 33, 5, 2**40),
            (400, 16, 50, 7),
            (90, 3, 100, 1),
            (4, 1000, 3, 9),
        ],
    )
    def test_equals_twin(
        self, n: int, Y: int, k: int, row_offset: int, replacement: bool, dtype: torch.dtype
    ) -> None:
        logits = case(n, Y, dtype)
        options = {"replacement": replacement, "seed": -12345, "row_offset": row_offset}
        got = fi.class_multinomial(logits, k, **options)
        want = reference.class_multinomial(logits, k, **options)
        assert_same(got, want)
        assert torch.equal(got.skipped, want[3])
        assert got.skipped > 0

    @settings(max_examples=60, deadline=None)
    @given(
        n=st.integers(0, 80),
        Y=st.integers(0, 40),
        k=st.integers(0, 12),
        replacement=st.booleans(),
        seed=st.integers(-(2**63), 2**63 - 1),
        row_offset=st.integers(0, 2**50),
    )
    def test_equals_twin_at_any_shape(
        self, n: int, Y: int, k: int, replacement: bool, seed: int, row_offset: int
    ) -> None:
        logits = case(n, Y, seed=seed)
        options = {"replacement": replacement, "seed": seed, "row_offset": row_offset}
        got = fi.class_multinomial(logits, k, **options)
        assert got.rows.shape == got.log_keys.shape == (Y, k)
        assert_same(got, reference.class_multinomial(logits, k, **options))

    def test_zero_probability_is_never_drawn(self) -> None:
        logits = torch.full((1000, 2), -INF)
        logits[:, 1] = 0
        logits[[3, 500], 0] = 0
        sample = fi.class_multinomial(logits, 5, seed=1)
        assert sorted(sample.rows[0].tolist()) == [-1, -1, -1, 3, 500]
        assert sample.log_keys[0, 2:].tolist() == [-INF] * 3
        assert sample.log_threshold[0] == -INF
        assert sample.log_threshold[1] > -INF
        again = fi.class_multinomial(logits, 50, seed=1, replacement=True)
        assert set(again.rows[0].tolist()) == {3, 500}

    def test_nan_rows_are_skipped_and_counted(self) -> None:
        logits = torch.zeros(100, 3)
        logits[7, 1], logits[9] = NAN, -INF
        logits[11] = torch.tensor([NAN, INF, 0])  # NaN goes before +inf
        sample = fi.class_multinomial(logits, 100, seed=0)
        assert sample.skipped.tolist() == [3]
        assert not {7, 9, 11} & set(sample.rows.flatten().tolist())
        assert (sample.rows >= 0).sum() == 3 * 97

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_infinite_logit_is_an_error(self, dtype: torch.dtype) -> None:
        logits = torch.zeros(50_000, 3, dtype=dtype)
        logits[[41, 40_000], 2] = INF
        with pytest.raises(RuntimeError, match=r"\+inf in row 41"):
            fi.class_multinomial(logits, 2, seed=0)

    def test_extreme_logits(self) -> None:
        """Gaps that no float32 probability holds, and whole logits that no float32 holds."""
        g = torch.Generator().manual_seed(0)
        logits = 1e5 * torch.randn(300, 4, generator=g, dtype=torch.float64)
        logits += 1e300 * (torch.arange(300) % 2).double()[:, None]
        for x in (logits, logits[::2].float(), torch.full((300, 4), 3e38)):
            assert_same(
                fi.class_multinomial(x, 20, seed=3), reference.class_multinomial(x, 20, seed=3)
            )


class TestBottomK:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("replacement", [False, True])
    @pytest.mark.parametrize("unit", [1.0, 1e-4])
    def test_equals_twin_with_any_strides(
        self, dtype: torch.dtype, replacement: bool, unit: float
    ) -> None:
        w = (unit * torch.randn(5, 900).exp().double()).masked_fill(torch.rand(5, 900) < 0.2, 0)
        w = w.to(dtype)
        want = reference.bottom_k(w, 30, replacement=replacement, seed=4, row_offset=11)
        wide = w.repeat_interleave(2, dim=1)
        for x in (w, w.t().contiguous().t(), wide[:, ::2]):
            got = fi.bottom_k(x, 30, replacement=replacement, seed=4, row_offset=11)
            assert_same(got, want)

    @pytest.mark.parametrize("unit", [1e-310, 1e-200, 1e250])
    def test_any_unit_of_double(self, unit: float) -> None:
        w = torch.rand(2, 3000, dtype=torch.float64) * unit
        assert_same(fi.bottom_k(w, 9, seed=1), reference.bottom_k(w, 9, seed=1))

    def test_any_unit_of_float(self) -> None:
        for unit in (1e-42, 1e-30, 3e38):
            w = torch.rand(3000) * unit
            assert_same(fi.bottom_k(w, 9, seed=1), reference.bottom_k(w, 9, seed=1))

    def test_transposed_probabilities_give_class_multinomial(self) -> None:
        logits = torch.randn(500, 6, dtype=torch.float64)
        a = fi.class_multinomial(logits, 8, seed=2, row_offset=5)
        b = fi.bottom_k(torch.softmax(logits, 1).t(), 8, seed=2, row_offset=5)
        assert_same(a, b)

    def test_shapes(self) -> None:
        one = fi.bottom_k(torch.rand(9), 4, seed=0)
        assert (one.rows.shape, one.log_threshold.shape) == ((4,), ())
        assert fi.bottom_k(torch.rand(3, 0), 2, seed=0).rows.tolist() == [[-1, -1]] * 3
        assert fi.bottom_k(torch.rand(0, 5), 2, seed=0).rows.shape == (0, 2)
        assert fi.bottom_k(torch.zeros(5), 2, seed=0).rows.tolist() == [-1, -1]

    @pytest.mark.parametrize("bad", [-1.0, NAN, INF, -INF])
    @pytest.mark.parametrize("position", [3, 4, 9998])
    def test_invalid_weight_is_named(self, bad: float, position: int) -> None:
        w = torch.rand(2, 9999)
        w[1, position] = bad
        for x in (w, w.t().contiguous().t(), w.double(), w.half()):
            with pytest.raises(RuntimeError, match=f"line 1, position {position}"):
                fi.bottom_k(x, 2, seed=0)


class TestCurvature:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("n", "Y"), [(1000, 10), (333, 33), (50, 1), (0, 4), (7, 0), (99, 8)])
    def test_sizes_equal_twin(self, n: int, Y: int, dtype: torch.dtype) -> None:
        logits = case(n, Y, dtype)
        scale = torch.rand(n)
        for row_scale in (None, scale, scale.double()):
            got = fi.curvature_sizes(logits, row_scale=row_scale)
            want = reference.curvature_sizes(logits, row_scale=row_scale)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=2e-44)

    def test_confident_rows_do_not_cancel(self) -> None:
        for step, rtol in ((0.5, 3e-7), (1 / 3, 6e-6)):  # floats, and gaps that none equals
            gap = torch.arange(0, 100, step, dtype=torch.float64)
            logits = torch.stack([gap, torch.zeros_like(gap)], 1)
            want = 2 * torch.sigmoid(-gap) * torch.sigmoid(gap)
            got = fi.curvature_sizes(logits).double()
            torch.testing.assert_close(got, want, rtol=rtol, atol=2e-44)
            few = gap < 8
            torch.testing.assert_close(got[few], want[few], rtol=1e-6, atol=0)

    def test_ties_and_classes_far_below(self) -> None:
        logits = torch.full((4, 300), -106.0)
        logits[0, 0] = 0
        logits[1, [0, 299]] = 0
        logits[2, 5:] = -INF
        logits[3, 7] = 20
        torch.testing.assert_close(
            fi.curvature_sizes(logits), torch.tensor([0, 0.5, 0.8, 0]), rtol=1e-6, atol=1e-44
        )

    @pytest.mark.parametrize("floor", [0.0, 0.3])
    @pytest.mark.parametrize("scaled", [False, True])
    def test_is_bottom_k_of_the_sizes(self, floor: float, scaled: bool) -> None:
        logits = case(5000, 10)
        row_scale = torch.rand(5000) if scaled else None
        got = fi.curvature_multinomial(
            logits, 200, row_scale=row_scale, floor=floor, seed=8, row_offset=3
        )
        sizes = floor + fi.curvature_sizes(logits, row_scale=row_scale)
        want = fi.bottom_k(sizes, 200, seed=8, row_offset=3)
        assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True))
        assert got.log_threshold.shape == ()
        assert got.skipped == (logits.isnan().any(1) | logits.isneginf().all(1)).sum()
        assert_same(
            got,
            reference.curvature_multinomial(
                logits, 200, row_scale=row_scale, floor=floor, seed=8, row_offset=3
            ),
        )

    def test_bad_rows_are_named(self) -> None:
        logits = torch.zeros(9000, 3)
        for bad in (-1.0, NAN, INF):
            scale = torch.ones(9000)
            scale[[77, 8000]] = bad
            with pytest.raises(RuntimeError, match="row 77"):
                fi.curvature_sizes(logits, row_scale=scale)
            with pytest.raises(RuntimeError, match="row 77"):
                fi.curvature_multinomial(logits, 2, row_scale=scale, seed=0)
        logits[[5, 6000], 1] = INF
        with pytest.raises(RuntimeError, match=r"\+inf in row 5"):
            fi.curvature_sizes(logits)
        with pytest.raises(RuntimeError, match=r"\+inf in row 5"):
            fi.curvature_multinomial(logits, 2, seed=0)


class TestArguments:
    def test_seed_and_generator(self) -> None:
        logits = torch.randn(500, 3)
        torch.manual_seed(5)
        a = fi.class_multinomial(logits, 9)
        b = fi.class_multinomial(logits, 9)
        torch.manual_seed(5)
        assert_identical(a, fi.class_multinomial(logits, 9))
        assert not torch.equal(a.rows, b.rows)
        seeded = [
            fi.class_multinomial(logits, 9, generator=torch.Generator().manual_seed(1)).rows
            for _ in range(2)
        ]
        assert torch.equal(*seeded)
        with pytest.raises(ValueError, match="either seed or generator"):
            fi.class_multinomial(logits, 9, seed=1, generator=torch.Generator())

    def test_bad_input(self) -> None:
        x = torch.zeros(4, 3)
        with pytest.raises(ValueError, match=r"logits must be 2-D, got shape \[3\]"):
            fi.class_multinomial(x[0], 1, seed=0)
        with pytest.raises(TypeError, match=r"logits has dtype torch\.int64"):
            fi.class_multinomial(x.long(), 1, seed=0)
        with pytest.raises(ValueError, match="k must be at least 0, got -1"):
            fi.class_multinomial(x, -1, seed=0)
        with pytest.raises(TypeError, match="k must be an int, got float"):
            fi.bottom_k(x, 1.0, seed=0)
        with pytest.raises(ValueError, match="row_offset must be at least 0"):
            fi.bottom_k(x, 1, seed=0, row_offset=-1)
        with pytest.raises(RuntimeError, match="row_offset"):
            fi.class_multinomial(x, 1, seed=0, row_offset=2**63 - 2)
        with pytest.raises(ValueError, match="weights must be 1-D or 2-D"):
            fi.bottom_k(torch.zeros(1, 2, 3), 1, seed=0)
        with pytest.raises(ValueError, match="row_scale has length 3"):
            fi.curvature_multinomial(x, 1, row_scale=torch.ones(3), seed=0)
        for floor in (-0.1, NAN, INF):
            with pytest.raises(ValueError, match="floor must be finite and not negative"):
                fi.curvature_multinomial(x, 1, floor=floor, seed=0)
        for call in (
            lambda t: fi.class_multinomial(t, 1, seed=0),
            lambda t: fi.bottom_k(t, 1, seed=0),
            fi.curvature_sizes,
        ):
            with pytest.raises(RuntimeError, match=r"requires grad: pass \w+.detach\(\)"):
                call(torch.zeros(4, 3, requires_grad=True))
        policy = torch.ones(4, requires_grad=True)  # as torch.multinomial
        assert fi.multinomial(policy.softmax(0), 2, seed=0).shape == (2,)

    def test_forward_mode_is_refused(self) -> None:
        """Without a rule of their own the derivative would come out as zero."""
        x, p = torch.randn(4, 3), torch.randn(4, 3).softmax(1)
        for call in (
            lambda t: fi.softmax_hvp(p, t),
            lambda t: fi.linear_softmax_hvp(t, p, torch.ones(3, 3)),
            lambda t: fi.kmeans_assign(t, x[:2])[1],
        ):
            with pytest.raises(RuntimeError, match=r"carries a forward-mode tangent"):
                torch.func.jvp(call, (x,), (x,))

    def test_inclusion_probability_of_sure_rows(self) -> None:
        z = torch.zeros(1000, 2)
        z[:, 0] = 95
        sample = fi.curvature_multinomial(z, 5, seed=0)
        assert sample.log_threshold < -88
        pi = fi.inclusion_probability(fi.curvature_sizes(z), sample.log_threshold)
        assert pi.dtype == torch.float32
        assert 0.001 < float(pi[0]) < 0.02
        assert float(fi.inclusion_probability(torch.zeros(1), torch.tensor(-90.0))) == 0.0

    def test_non_contiguous_logits(self) -> None:
        x = torch.randn(12, 300)
        for y in (x.t(), torch.randn(600, 12)[::2]):
            assert_identical(
                fi.class_multinomial(y, 5, seed=0), fi.class_multinomial(y.contiguous(), 5, seed=0)
            )
            assert torch.equal(fi.curvature_sizes(y), fi.curvature_sizes(y.contiguous()))

    def test_opcheck(self) -> None:
        ops = torch.ops.fastif_ext
        x, w = torch.randn(40, 5), torch.rand(3, 40)
        check = torch.library.opcheck
        check(ops.class_multinomial, (x, 4, False, 1, 2))
        check(ops.bottom_k, (w, 4, True, 1, 2, True))
        check(ops.curvature_sizes, (x, None))
        check(ops.curvature_sizes, (x, torch.ones(40, dtype=torch.float64)))
        check(ops.curvature_multinomial, (x, 4, 1, 2, None, 0.5))
        sample = fi.class_multinomial(x, 4, seed=0)
        check(ops.merge_samples, (*sample[:3], *sample[:3]))

    def test_compile(self) -> None:
        x, w = torch.randn(200, 5), torch.rand(200)

        def everything(x: Tensor, w: Tensor) -> list[Tensor]:
            a = fi.class_multinomial(x[:100], 4, seed=1)
            b = fi.class_multinomial(x[100:], 4, seed=1, row_offset=100)
            pool = fi.curvature_multinomial(x, 6, row_scale=w, floor=0.1, seed=2)
            size = 0.1 + fi.curvature_sizes(x, row_scale=w)[pool.rows]
            return [
                *fi.merge_samples(a, b),
                *pool,
                fi.inclusion_probability(size, pool.log_threshold),
                fi.bottom_k(w, 5, replacement=True, seed=3).rows,
                fi.multinomial(w, 5, seed=3),
            ]

        want = everything(x, w)
        for got, expected in zip(
            torch.compile(everything, fullgraph=True)(x, w), want, strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
