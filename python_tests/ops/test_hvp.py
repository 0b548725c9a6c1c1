"""Contracts of the curvature operators, against their pure-PyTorch twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastif_ext as fi
from fastif_ext import reference

SHAPES = [(7,), (3, 5), (), (70001,), (0,), (2, 1, 4)]


def lissa_case(
    R: int, dtype: torch.dtype, hvp_dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(R)
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
