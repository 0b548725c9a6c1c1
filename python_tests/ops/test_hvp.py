"""Contracts of the curvature operators, against their pure-PyTorch twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastif_ext as fi
from fastif_ext import reference

pytestmark = pytest.mark.usefixtures("everywhere")

SHAPES = [(7,), (3, 5), (), (70001,), (0,), (2, 1, 4)]


def lissa_case(
    R: int, dtype: torch.dtype, hvp_dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    g = torch.Generator(torch.get_default_device()).manual_seed(R)
    hvp = [torch.randn(R, *s, generator=g, dtype=torch.float64).to(hvp_dtype) for s in SHAPES]
    p = sum(t[0].numel() for t in hvp)
    h, v = torch.randn(2, R, p, generator=g, dtype=torch.float64).to(dtype)
    return h, v, hvp


class TestLissaUpdate:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("R", [1, 3])
    @pytest.mark.parametrize(
        ("dtype", "hvp_dtype"),
        [
            (torch.float32, torch.float32),
            (torch.float32, torch.float16),
            (torch.float32, torch.bfloat16),
            (torch.float64, torch.float64),
        ],
    )
    def test_equals_twin(
        self, R: int, dtype: torch.dtype, hvp_dtype: torch.dtype, masked: bool
    ) -> None:
        h, v, hvp = lissa_case(R, dtype, hvp_dtype)
        mask = torch.rand(h.shape[1]) < 0.3 if masked else None
        expected_h = h.clone()
        expected = reference.lissa_update_(expected_h, v, hvp, damping=0.3, scale=7.0, mask=mask)
        step = fi.lissa_update_(h, v, hvp, damping=0.3, scale=7.0, mask=mask)
        torch.testing.assert_close(h, expected_h)
        for got, want in zip(step, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)

    def test_threads_change_no_bit(self, threads: None) -> None:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            h, v, hvp = lissa_case(2, torch.float32, torch.float32)
            results.append((fi.lissa_update_(h, v, hvp, damping=0.1, scale=2.0), h))
        (a, h1), (b, h2) = results
        assert torch.equal(h1, h2)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_finite_is_per_right_hand_side(self, bad: float) -> None:
        h, v, hvp = lissa_case(3, torch.float32, torch.float32)
        hvp[3][1, 69999] = bad
        step = fi.lissa_update_(h, v, hvp, damping=0.1, scale=2.0)
        assert step.finite.tolist() == [True, False, True]

    def test_non_contiguous_product_and_empty(self) -> None:
        h, v, hvp = lissa_case(2, torch.float32, torch.float32)
        hvp[1] = hvp[1].transpose(1, 2).contiguous().transpose(1, 2)
        expected_h = h.clone()
        reference.lissa_update_(expected_h, v, hvp, damping=0.1, scale=2.0)
        fi.lissa_update_(h, v, hvp, damping=0.1, scale=2.0)
        torch.testing.assert_close(h, expected_h)
        empty = torch.empty(2, 0)
        step = fi.lissa_update_(empty, empty, [empty], damping=0.1, scale=2.0)
        assert step.norm_sq.tolist() == [0, 0]
        assert step.finite.all()
        none = torch.empty(0, 3)
        assert fi.lissa_update_(none, none, [none], damping=0.1, scale=2.0).finite.shape == (0,)

    def test_bad_input(self) -> None:
        h, v = torch.zeros(1, 4), torch.zeros(1, 4)
        ok = [torch.zeros(1, 4)]
        with pytest.raises(ValueError, match=r"v has shape \[1, 3\]"):
            fi.lissa_update_(h, torch.zeros(1, 3), ok, damping=0.0, scale=1.0)
        with pytest.raises(ValueError, match="hvp has 3 elements"):
            fi.lissa_update_(h, v, [torch.zeros(1, 3)], damping=0.0, scale=1.0)
        with pytest.raises(ValueError, match="hvp is empty"):
            fi.lissa_update_(h, v, [], damping=0.0, scale=1.0)
        with pytest.raises(ValueError, match="scale must be positive, got 0"):
            fi.lissa_update_(h, v, ok, damping=0.0, scale=0.0)
        with pytest.raises(TypeError, match="hvp has dtypes"):
            fi.lissa_update_(h, v, [torch.zeros(1, 4).double()], damping=0.0, scale=1.0)
        with pytest.raises(ValueError, match="contiguous"):
            fi.lissa_update_(torch.zeros(4, 1).t()[:, ::2], v, ok, damping=0.0, scale=1.0)
        with pytest.raises(ValueError, match="mask has length 3"):
            fi.lissa_update_(h, v, ok, damping=0.0, scale=1.0, mask=torch.ones(3, dtype=torch.bool))
        with pytest.raises(RuntimeError, match=r"v requires grad: pass v.detach\(\)"):
            fi.lissa_update_(h, v.requires_grad_(), ok, damping=0.0, scale=1.0)

    def test_opcheck_and_compile(self) -> None:
        h, v, hvp = lissa_case(2, torch.float32, torch.float32)
        torch.library.opcheck(torch.ops.fastif_ext.lissa_update_, (h, v, hvp, 0.1, 2.0, None))
        eager = h.clone()
        want = fi.lissa_update_(eager, v, hvp, damping=0.1, scale=2.0)

        @torch.compile(fullgraph=True)
        def step(h: Tensor, v: Tensor, hvp: list[Tensor]) -> tuple[Tensor, ...]:
            return tuple(fi.lissa_update_(h, v, hvp, damping=0.1, scale=2.0))

        got = step(h, v, hvp)
        assert torch.equal(h, eager)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def softmax_case(
    n: int, C: int, R: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    probs = (2 * torch.randn(n, C, dtype=torch.float64)).softmax(1).to(dtype)
    z = torch.randn(*([] if R is None else [R]), n, C, dtype=torch.float64).to(dtype)
    return probs, z, torch.rand(n)


HALF = (torch.float16, torch.bfloat16)


class TestSoftmaxHvp:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
    @pytest.mark.parametrize("R", [None, 1, 3])
    @pytest.mark.parametrize(("n", "C"), [(1, 1), (5, 2), (37, 10), (33, 16), (40, 23), (9, 1000)])
    def test_equals_twin(self, n: int, C: int, R: int | None, dtype: torch.dtype) -> None:
        probs, z, w = softmax_case(n, C, R, dtype)
        for weight in (None, w):
            got = fi.softmax_hvp(probs, z, weight)
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            want = reference.softmax_hvp(probs.double(), z.double(), weight).to(got.dtype)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    def test_is_the_hessian_of_cross_entropy(self) -> None:
        logits = torch.randn(6, dtype=torch.float64)
        z = torch.randn(6, dtype=torch.float64)
        H = torch.func.hessian(lambda x: -x.log_softmax(0)[2])(logits)
        got = fi.softmax_hvp(logits.softmax(0)[None], z[None])[0]
        torch.testing.assert_close(got, H @ z)

    def test_rows_sum_to_zero_far_from_zero(self) -> None:
        """Without the subtraction first, an offset of 1e4 would leave a sum of about 1e-3."""
        probs, z, _ = softmax_case(200, 10, 2, torch.float32)
        u = fi.softmax_hvp(probs, z + 1e4)
        assert float(u.sum(-1).abs().max()) < 5e-3
        torch.testing.assert_close(u, fi.softmax_hvp(probs, z), rtol=0, atol=3e-3)

    @pytest.mark.parametrize("C", [10, 100])
    def test_nan_stays_in_its_row_and_threads_change_no_bit(self, C: int, threads: None) -> None:
        probs, z, w = softmax_case(9001, C, 2, torch.float32)
        z[1, 77, 3] = float("nan")
        results = []
        for t in (1, 2):
            torch.set_num_threads(t)
            results.append(fi.softmax_hvp(probs, z, w))
        assert torch.equal(results[0].nan_to_num(7), results[1].nan_to_num(7))
        bad = results[0].isnan().any(-1)
        assert bad.nonzero().tolist() == [[1, 77]]

    def test_empty_and_non_contiguous(self) -> None:
        assert fi.softmax_hvp(torch.empty(0, 3), torch.empty(2, 0, 3)).shape == (2, 0, 3)
        assert fi.softmax_hvp(torch.empty(4, 0), torch.empty(4, 0)).shape == (4, 0)
        assert fi.softmax_hvp(torch.rand(4, 3), torch.empty(0, 4, 3)).shape == (0, 4, 3)
        probs, z, w = softmax_case(20, 7, 3, torch.float32)
        strided = fi.softmax_hvp(probs.t().contiguous().t(), z.mT.contiguous().mT, w[::1])
        assert torch.equal(strided, fi.softmax_hvp(probs, z, w))

    def test_bad_input(self) -> None:
        p, z = torch.rand(4, 3), torch.rand(4, 3)
        with pytest.raises(ValueError, match=r"z has shape \[4, 2\]"):
            fi.softmax_hvp(p, z[:, :2])
        with pytest.raises(TypeError, match="z has dtype torch.float64; supported: float32"):
            fi.softmax_hvp(p, z.double())
        with pytest.raises(ValueError, match="weight has length 3, there are 4 rows"):
            fi.softmax_hvp(p, z, torch.ones(3))
        with pytest.raises(RuntimeError, match=r"pass probs.detach\(\)"):
            fi.softmax_hvp(p.requires_grad_(), z)

    def test_opcheck_and_compile(self) -> None:
        probs, z, w = softmax_case(20, 7, 3, torch.float32)
        torch.library.opcheck(torch.ops.fastif_ext.softmax_hvp, (probs, z, w))
        compiled = torch.compile(fi.softmax_hvp, fullgraph=True)
        assert torch.equal(compiled(probs, z, w), fi.softmax_hvp(probs, z, w))


class TestLinearSoftmaxHvp:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("R", [None, 1, 3])
    @pytest.mark.parametrize(("n", "d", "C"), [(1, 1, 2), (300, 17, 10), (5000, 3, 25), (10, 0, 3)])
    def test_equals_twin(
        self, n: int, d: int, C: int, R: int | None, bias: bool, dtype: torch.dtype
    ) -> None:
        probs, _, w = softmax_case(n, C, None, dtype)
        x = torch.randn(n, d, dtype=torch.float64).to(dtype)
        shape = [C, d + bias] if R is None else [R, C, d + bias]
        v = torch.randn(shape, dtype=torch.float64).to(dtype)
        for weight in (None, w):
            got = fi.linear_softmax_hvp(x, probs, v, weight)
            want = reference.linear_softmax_hvp(x.double(), probs.double(), v.double(), weight)
            scale = max([1.0, *want.abs().flatten().tolist()])
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6 * scale)
            assert got.shape == v.shape

    @pytest.mark.parametrize("bias", [False, True])
    def test_is_the_dense_hessian(self, bias: bool) -> None:
        x, y = torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,))
        w = torch.rand(30, dtype=torch.float64)
        W = torch.randn(3, 5 if bias else 4, dtype=torch.float64)
        extended = torch.cat([x, torch.ones(30, 1)], 1) if bias else x

        def loss(W: Tensor) -> Tensor:
            losses = torch.nn.functional.cross_entropy(extended @ W.T, y, reduction="none")
            return (w * losses).sum()

        H = torch.func.hessian(loss)(W).reshape(W.numel(), W.numel())
        v = torch.randn(5, *W.shape, dtype=torch.float64)
        probs = (extended @ W.T).softmax(1)
        got = fi.linear_softmax_hvp(x, probs, v, w)
        torch.testing.assert_close(got.flatten(1), v.flatten(1) @ H)

    @pytest.mark.parametrize(("n", "d", "C", "R"), [(20_000, 64, 10, 8), (100, 64, 10, 1)])
    def test_threads_change_no_bit(self, n: int, d: int, C: int, R: int, threads: None) -> None:
        probs, _, w = softmax_case(n, C, None, torch.float32)
        x, v = torch.randn(n, d), torch.randn(R, C, d + 1)
        results = []
        for t in (1, 2, 3):
            torch.set_num_threads(t)
            results.append(fi.linear_softmax_hvp(x, probs, v, w))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    def test_autocast_does_not_reach_inside(self) -> None:
        probs, _, w = softmax_case(50, 4, None, torch.float32)
        x, v = torch.randn(50, 6), torch.randn(4, 6)
        want = fi.linear_softmax_hvp(x, probs, v, w)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            assert torch.equal(fi.linear_softmax_hvp(x, probs, v, w), want)

    def test_empty_and_non_contiguous(self) -> None:
        none = fi.linear_softmax_hvp(torch.empty(0, 3), torch.empty(0, 2), torch.ones(2, 3))
        assert torch.equal(none, torch.zeros(2, 3))
        probs, _, w = softmax_case(50, 4, None, torch.float32)
        x, v = torch.randn(50, 6), torch.randn(2, 4, 6)
        got = fi.linear_softmax_hvp(x.t().contiguous().t(), probs, v.mT.contiguous().mT, w)
        assert torch.equal(got, fi.linear_softmax_hvp(x, probs, v, w))

    def test_bad_input(self) -> None:
        x, p, v = torch.rand(5, 3), torch.rand(5, 2), torch.rand(2, 3)
        with pytest.raises(ValueError, match="probs has 4 rows, x has 5"):
            fi.linear_softmax_hvp(x, p[:4], v)
        with pytest.raises(ValueError, match=r"must end in \[2, 3\] or, with a bias, \[2, 4\]"):
            fi.linear_softmax_hvp(x, p, torch.rand(2, 5))
        with pytest.raises(TypeError, match="v has dtype torch.float64"):
            fi.linear_softmax_hvp(x, p, v.double())
        with pytest.raises(RuntimeError, match=r"pass x.detach\(\)"):
            fi.linear_softmax_hvp(x.requires_grad_(), p, v)

    def test_opcheck_and_compile(self) -> None:
        probs, _, w = softmax_case(20, 7, None, torch.float32)
        x, v = torch.randn(20, 5), torch.randn(3, 7, 6)
        torch.library.opcheck(torch.ops.fastif_ext.linear_softmax_hvp, (x, probs, v, w))
        compiled = torch.compile(fi.linear_softmax_hvp, fullgraph=True)
        want = fi.linear_softmax_hvp(x, probs, v, w)
        assert torch.equal(compiled(x, probs, v, w), want)


class TestHvpAccumulate:
    @pytest.mark.parametrize(
        ("dtype", "hvp_dtype"),
        [
            (torch.float32, torch.float32),
            (torch.float32, torch.float16),
            (torch.float32, torch.bfloat16),
            (torch.float64, torch.float64),
        ],
    )
    def test_equals_twin(self, dtype: torch.dtype, hvp_dtype: torch.dtype) -> None:
        acc, _, hvp = lissa_case(3, dtype, hvp_dtype)
        hvp[1] = hvp[1].transpose(1, 2).contiguous().transpose(1, 2)
        want = reference.hvp_accumulate_(acc.clone(), hvp, 0.3)
        assert fi.hvp_accumulate_(acc, hvp, 0.3) is acc
        torch.testing.assert_close(acc, want)

    def test_mini_batches_add_up_and_threads_change_no_bit(self, threads: None) -> None:
        results = []
        for t in (1, 2):
            torch.set_num_threads(t)
            acc, _, hvp = lissa_case(2, torch.float32, torch.float32)
            for weight in (0.25, 0.75):
                fi.hvp_accumulate_(acc, hvp, weight)
            results.append(acc)
        start, _, hvp = lissa_case(2, torch.float32, torch.float32)
        torch.testing.assert_close(results[0], reference.hvp_accumulate_(start, hvp, 1.0))
        assert torch.equal(results[0], results[1])

    def test_empty_bad_input_opcheck(self) -> None:
        empty = torch.empty(2, 0)
        assert fi.hvp_accumulate_(empty, [empty], 1.0) is empty
        acc = torch.zeros(2, 3)
        with pytest.raises(ValueError, match="hvp has 2 elements per right-hand side"):
            fi.hvp_accumulate_(acc, [torch.zeros(2, 2)], 1.0)
        with pytest.raises(ValueError, match="each must begin with R = 2"):
            fi.hvp_accumulate_(acc, [torch.zeros(1, 3)], 1.0)
        torch.library.opcheck(
            torch.ops.fastif_ext.hvp_accumulate_, (acc, [torch.ones(2, 1), torch.ones(2, 2)], 0.5)
        )
        compiled = torch.compile(fi.hvp_accumulate_, fullgraph=True)
        compiled(acc, [torch.ones(2, 3)], 2.0)
        assert acc.unique().tolist() in ([2.0], [2.5])
