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
    check_tensor(op, "h", h, dims=(2,), dtypes=(torch.float32, torch.float64))
    check_tensor(op, "v", v, dims=(2,), dtypes=(h.dtype,))
    hvp = list(hvp)
    if not hvp:
        raise ValueError(f"{op}: hvp is empty; pass one tensor [R, *shape] per parameter")
    if not h.is_contiguous():
        raise ValueError(f"{op}: h must be contiguous, it is updated in place")
    if v.shape != h.shape:
        raise ValueError(f"{op}: v has shape {shape(v)}, h has {shape(h)}; they must be equal")
    for t in hvp:
        if t.dim() < 1 or t.shape[0] != h.shape[0]:
            raise ValueError(
                f"{op}: hvp has a tensor of shape {shape(t)}; each must begin with R = {h.shape[0]}"
            )
    total = sum(t[0].numel() if h.shape[0] else t.shape[1:].numel() for t in hvp)
    if total != h.shape[1]:
        raise ValueError(
            f"{op}: hvp has {total} elements per right-hand side, h has p = {h.shape[1]}"
        )
    allowed = (h.dtype,) if h.dtype == torch.float64 else (h.dtype, torch.float16, torch.bfloat16)
    if hvp[0].dtype not in allowed or any(t.dtype != hvp[0].dtype for t in hvp):
        raise TypeError(
            f"{op}: hvp has dtypes {sorted({str(t.dtype) for t in hvp})}; h is {h.dtype}, so all "
            f"must be one of {[str(d) for d in allowed]}"
        )
    if not scale > 0:
        raise ValueError(f"{op}: scale must be positive, got {scale}")
    if mask is not None:
        check_tensor(op, "mask", mask, dims=(1,), dtypes=(torch.bool,))
        if mask.shape[0] != h.shape[1]:
            raise ValueError(f"{op}: mask has length {mask.shape[0]}, h has p = {h.shape[1]}")
    check_same_device(op, h=h, v=v, mask=mask, **{f"hvp[{i}]": t for i, t in enumerate(hvp)})
    check_no_grad(op, h=h, v=v, **{f"hvp[{i}]": t for i, t in enumerate(hvp)})
    return LissaStep(*torch.ops.fastif_ext.lissa_update_(h, v, hvp, damping, scale, mask))


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
