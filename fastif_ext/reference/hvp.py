"""Pure-PyTorch twins of the curvature operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def softmax_hvp(probs: Tensor, z: Tensor, weight: Tensor | None = None) -> Tensor:
    """Twin of fastif_ext.softmax_hvp."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    p, z = probs.to(dtype), z.to(dtype)
    u = p * (z - (p * z).sum(-1, keepdim=True))
    return u if weight is None else weight.to(dtype)[:, None] * u


def linear_softmax_hvp(x: Tensor, probs: Tensor, v: Tensor, weight: Tensor | None = None) -> Tensor:
    """Twin of fastif_ext.linear_softmax_hvp: the whole n x RC intermediate at once."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, probs, v = x.to(dtype), probs.to(dtype), v.to(dtype)
    if v.shape[-1] == x.shape[1] + 1:
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    z = torch.einsum("nd,...cd->...nc", x, v)
    return torch.einsum("...nc,nd->...cd", softmax_hvp(probs, z, weight), x)


def hvp_accumulate_(acc: Tensor, hvp: Sequence[Tensor], weight: float) -> Tensor:
    """Twin of fastif_ext.hvp_accumulate_."""
    flat = [t.reshape(t.shape[0], t.shape[1:].numel()) for t in hvp]
    return acc.add_(torch.cat(flat, dim=1).to(acc.dtype), alpha=weight)


def lissa_update_(
    h: Tensor,
    v: Tensor,
    hvp: Sequence[Tensor],
    *,
    damping: float,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of fastif_ext.lissa_update_: the same definition, one torch call per term."""
    product = torch.cat([t.reshape(t.shape[0], t.shape[1:].numel()) for t in hvp], dim=1).to(
        h.dtype
    )
    new = v + (1 - damping / scale) * h - product / scale
    delta = new - h
    if mask is not None:
        new, delta = (torch.where(mask.bool(), t, 0) for t in (new, delta))
    h.copy_(new)
    norm_sq = new.double().square().sum(1)
    return delta.double().square().sum(1), norm_sq, norm_sq.isfinite()
