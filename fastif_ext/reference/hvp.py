"""Pure-PyTorch twins of the curvature operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
        new, delta = new * mask, delta * mask
    h.copy_(new)
    norm_sq = new.double().square().sum(1)
    return delta.double().square().sum(1), norm_sq, norm_sq.isfinite()
