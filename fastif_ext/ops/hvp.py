"""Operators for curvature products and the LiSSA recursion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastif_ext.ops._check import check_no_grad, check_same_device, check_tensor, shape


class LissaStep(NamedTuple):
    """What one LiSSA step reports for each of the R right-hand sides."""

    delta_sq: Tensor
    """|h_new - h_old|^2, float64 [R]."""
    norm_sq: Tensor
    """|h_new|^2, float64 [R]."""
    finite: Tensor
    """Whether every element of h_new is finite, bool [R]."""


def softmax_hvp(probs: Tensor, z: Tensor, weight: Tensor | None = None) -> Tensor:
    """The cross-entropy Hessian on logit tangents: u = w p (z - <p, z>), row by row.

    This is w (diag(p) - p p^T) z, the middle of a Gauss-Newton product. The subtraction comes
    first, so that each row of u sums to zero up to rounding.

    Args:
        probs: softmax probabilities, [n, C].
        z: tangents of the logits, [R, n, C] or [n, C], the dtype of probs: float32, float64,
            float16 or bfloat16.
        weight: one per row, [n]; 1 where None.

    Returns:
        u in z's shape, float32, or float64 for float64.

    Raises:
        TypeError, ValueError: a shape or dtype that does not fit.
        RuntimeError: an input requires grad while grad mode is on.

    Example:
        >>> import torch, fastif_ext as fi
        >>> fi.softmax_hvp(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))
        tensor([[ 0.2500, -0.2500]])
    """
    op = "softmax_hvp"
    check_tensor(op, "probs", probs, dims=(2,))
    check_tensor(op, "z", z, dims=(2, 3), dtypes=(probs.dtype,))
    if z.shape[-2:] != probs.shape:
        raise ValueError(
            f"{op}: z has shape {shape(z)}; its last two sizes must be those of probs, "
            f"{shape(probs)}"
        )
    weight = _check_weight(op, weight, probs.shape[0])
    check_same_device(op, probs=probs, z=z, weight=weight)
    check_no_grad(op, probs=probs, z=z, weight=weight)
    return torch.ops.fastif_ext.softmax_hvp(probs, z, weight)


@torch.library.register_fake("fastif_ext::softmax_hvp")
def _(probs: Tensor, z: Tensor, weight: Tensor | None = None) -> Tensor:
    return z.new_empty(z.shape, dtype=_result_dtype(z.dtype))


def linear_softmax_hvp(x: Tensor, probs: Tensor, v: Tensor, weight: Tensor | None = None) -> Tensor:
    """The exact Hessian product of a softmax linear layer under cross-entropy.

    sum_i w_i (diag(p_i) - p_i p_i^T)(V_r x_i) x_i^T for each right-hand side V_r. The n x R C
    intermediate is never whole in memory, and the number of threads changes no bit.

    Args:
        x: the layer's inputs, [n, d].
        probs: its softmax probabilities, [n, C], the dtype of x.
        v: directions, [R, C, d] or [C, d], the dtype of x. With d + 1 columns the last one is the
            bias: x is extended by a one.
        weight: one per row, [n]; None means 1, which gives a plain sum and not a mean.

    Returns:
        The products in v's shape, float32, or float64 for float64.

    Raises:
        TypeError, ValueError: a shape or dtype that does not fit.
        RuntimeError: an input requires grad while grad mode is on.

    Example:
        >>> import torch, fastif_ext as fi
        >>> x, p = torch.tensor([[2.0]]), torch.tensor([[0.5, 0.5]])
        >>> fi.linear_softmax_hvp(x, p, torch.tensor([[1.0], [0.0]]))
        tensor([[ 1.],
                [-1.]])
    """
    op = "linear_softmax_hvp"
    check_tensor(op, "x", x, dims=(2,))
    check_tensor(op, "probs", probs, dims=(2,), dtypes=(x.dtype,))
    check_tensor(op, "v", v, dims=(2, 3), dtypes=(x.dtype,))
    n, d = x.shape
    if probs.shape[0] != n:
        raise ValueError(f"{op}: probs has {probs.shape[0]} rows, x has {n}; they must be equal")
    if v.shape[-2] != probs.shape[1] or v.shape[-1] not in (d, d + 1):
        raise ValueError(
            f"{op}: v has shape {shape(v)}; it must end in [{probs.shape[1]}, {d}] or, with a "
            f"bias, [{probs.shape[1]}, {d + 1}]"
        )
    weight = _check_weight(op, weight, n)
    check_same_device(op, x=x, probs=probs, v=v, weight=weight)
    check_no_grad(op, x=x, probs=probs, v=v, weight=weight)
    return torch.ops.fastif_ext.linear_softmax_hvp(x, probs, v, weight)


@torch.library.register_fake("fastif_ext::linear_softmax_hvp")
def _(x: Tensor, probs: Tensor, v: Tensor, weight: Tensor | None = None) -> Tensor:
    return v.new_empty(v.shape, dtype=_result_dtype(v.dtype))


def hvp_accumulate_(acc: Tensor, hvp: Sequence[Tensor], weight: float) -> Tensor:
    """Add weight * hvp to acc in place, in one pass: products of mini-batches, gathered.

    Args:
        acc: [R, p], float32 or float64, contiguous; updated.
        hvp: products as autograd returns them, one tensor [R, *shape] per parameter, p elements in
            all for each right-hand side; acc's dtype, or float16/bfloat16 with a float32 acc.
        weight: the mini-batch's share.

    Returns:
        acc.

    Raises:
        TypeError, ValueError: a shape or dtype that does not fit.
        RuntimeError: an input requires grad while grad mode is on.

    Example:
        >>> import torch, fastif_ext as fi
        >>> fi.hvp_accumulate_(torch.zeros(1, 3), [torch.ones(1, 1), torch.ones(1, 2)], 0.5)
        tensor([[0.5000, 0.5000, 0.5000]])
    """
    op = "hvp_accumulate_"
    products = _check_products(op, "acc", acc, hvp)
    torch.ops.fastif_ext.hvp_accumulate_(acc, products, weight)
    return acc


@torch.library.register_fake("fastif_ext::hvp_accumulate_")
def _(acc: Tensor, hvp: list[Tensor], weight: float) -> None:
    return None


def _result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_weight(op: str, weight: Tensor | None, n: int) -> Tensor | None:
    if weight is not None:
        check_tensor(op, "weight", weight, dims=(1,))
        if weight.shape[0] != n:
            raise ValueError(f"{op}: weight has length {weight.shape[0]}, there are {n} rows")
    return weight


def _check_products(op: str, name: str, state: Tensor, hvp: Sequence[Tensor]) -> list[Tensor]:
    """Require a contiguous state [R, p] and products [R, *shape] that fit it."""
    check_tensor(op, name, state, dims=(2,), dtypes=(torch.float32, torch.float64))
    products = list(hvp)
    if not products:
        raise ValueError(f"{op}: hvp is empty; pass one tensor [R, *shape] per parameter")
    if not state.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, it is updated in place")
    R, total, dtype, device = state.shape[0], 0, products[0].dtype, state.device
    alike = True
    for t in products:  # one look at each: with many small parameters this loop is what takes time
        sizes = t.shape
        if not sizes or sizes[0] != R:
            raise ValueError(
                f"{op}: hvp has a tensor of shape {shape(t)}; each must begin with R = {R}"
            )
        total += t.numel()
        alike &= t.dtype is dtype and t.device == device and not t.requires_grad
    if total != state.numel():
        raise ValueError(
            f"{op}: hvp has {total // max(R, 1)} elements per right-hand side, {name} has p = "
            f"{state.shape[1]}"
        )
    allowed = [state.dtype]
    if state.dtype == torch.float32:
        allowed += [torch.float16, torch.bfloat16]
    if alike and dtype in allowed:
        check_same_device(op, **{name: state})
        check_no_grad(op, **{name: state})
        return products
    if any(t.dtype not in allowed or t.dtype != dtype for t in products):
        raise TypeError(
            f"{op}: hvp has dtypes {sorted({str(t.dtype) for t in products})}; {name} is "
            f"{state.dtype}, so all must be one of {[str(d) for d in allowed]}"
        )
    named = {f"hvp[{i}]": t for i, t in enumerate(products)}
    check_same_device(op, **{name: state}, **named)
    check_no_grad(op, **{name: state}, **named)
    return products


def lissa_update_(
    h: Tensor,
    v: Tensor,
    hvp: Sequence[Tensor],
    *,
    damping: float,
    scale: float,
    mask: Tensor | None = None,
) -> LissaStep:
    """One LiSSA step in place, in one pass over memory: h <- v + (1 - damping/scale) h - hvp/scale.

    The recursion (Agarwal et al. 2017) converges to scale * (H + damping I)^-1 v while
    0 < eig(H) + damping < 2 scale. The two norms and the finite flag come from the same pass;
    the result does not depend on the number of threads.

    Args:
        h: the current iterate, [R, p], float32 or float64, contiguous; overwritten.
        v: the right-hand sides, [R, p], h's dtype.
        hvp: H h as autograd returns it, one tensor [R, *shape] per parameter, p elements in all for
            each right-hand side; h's dtype, or float16/bfloat16 with a float32 h.
        damping: added to the diagonal of H, in the units of H.
        scale: the step is 1/scale; positive.
        mask: bool [p]; where false, h is held at zero.

    Returns:
        LissaStep(delta_sq, norm_sq, finite).

    Raises:
        TypeError, ValueError: a shape, dtype or value that does not fit; the message names it.
        RuntimeError: an input requires grad while grad mode is on.

    Example:
        >>> import torch, fastif_ext as fi
        >>> h, v = torch.zeros(1, 2), torch.tensor([[1.0, 2.0]])
        >>> step = fi.lissa_update_(h, v, [torch.zeros(1, 2)], damping=0.1, scale=1.0)
        >>> h, step.delta_sq
        (tensor([[1., 2.]]), tensor([5.], dtype=torch.float64))
    """
    op = "lissa_update_"
    products = _check_products(op, "h", h, hvp)
    check_tensor(op, "v", v, dims=(2,), dtypes=(h.dtype,))
    if v.shape != h.shape:
        raise ValueError(f"{op}: v has shape {shape(v)}, h has {shape(h)}; they must be equal")
    if not scale > 0:
        raise ValueError(f"{op}: scale must be positive, got {scale}")
    if mask is not None:
        check_tensor(op, "mask", mask, dims=(1,), dtypes=(torch.bool,))
        if mask.shape[0] != h.shape[1]:
            raise ValueError(f"{op}: mask has length {mask.shape[0]}, h has p = {h.shape[1]}")
    check_same_device(op, h=h, v=v, mask=mask)
    check_no_grad(op, v=v)
    return LissaStep(*torch.ops.fastif_ext.lissa_update_(h, v, products, damping, scale, mask))


@torch.library.register_fake("fastif_ext::lissa_update_")
def _(
    h: Tensor,
    v: Tensor,
    hvp: list[Tensor],
    damping: float,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = h.shape[0]
    return (
        h.new_empty(rows, dtype=torch.float64),
        h.new_empty(rows, dtype=torch.float64),
        h.new_empty(rows, dtype=torch.bool),
    )
