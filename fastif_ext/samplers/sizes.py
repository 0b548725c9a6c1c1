"""Drawing rows by size, with Horvitz-Thompson weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastif_ext import ops
from fastif_ext.samplers.base import generator


def check_share(sampler: str, uniform: float) -> None:
    """Require a share, a number in [0, 1]."""
    if not 0 <= uniform <= 1:
        raise ValueError(f"{sampler}: uniform must be between 0 and 1, got {uniform}")


def check_seed(sampler: str, seed: int) -> None:
    """Require a seed that the draw at the end of a pass will take."""
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"{sampler}: seed must be an int of 64 bits, got {seed!r}")


def mixture(sampler: str, sizes: Tensor, m: int, uniform: float) -> Tensor:
    """The sizes plus a constant that makes up the share `uniform` of their sum, on the CPU.

    There the sum has one order, so that the same sizes give the same rows on every device.
    """
    sizes = sizes.cpu()
    mean = sizes.numpy().mean(dtype=np.float64)  # numpy sums in one order on any threads
    if uniform == 1 or (mean == 0 and uniform > 0):
        return torch.ones_like(sizes)
    positive = int((sizes > 0).sum())
    if uniform == 0 and positive < m:
        raise ValueError(
            f"{sampler}: m = {m}, but only {positive} rows have positive size; take uniform > 0"
        )
    return sizes + float(mean * uniform / (1 - uniform))


def bottom_k(sizes: Tensor, m: int, seed: int) -> tuple[Tensor, Tensor]:
    """m distinct rows by bottom-k on the sizes, with weights 1 / (n pi)."""
    sample = ops.bottom_k(sizes, m, seed=seed)
    pi = ops.inclusion_probability(sizes[sample.rows].double(), sample.log_threshold)
    return sample.rows, 1 / (len(sizes) * pi)


def systematic(sizes: Tensor, position: Tensor, m: int, seed: int) -> tuple[Tensor, Tensor]:
    """m distinct rows by systematic PPS over the rows in lexicographic order of their position.

    pi_i = m f_i / sum f; rows that would exceed 1 are taken for certain and the rest rescaled.
    """
    f = sizes.double().numpy()
    n, certain = len(f), np.zeros(len(f), dtype=bool)
    while True:
        rest = m - certain.sum()
        pi = np.where(certain, 1.0, f * (rest / max(f[~certain].sum(), 1e-300)))
        over = ~certain & (pi >= 1)
        if not over.any():
            break
        certain |= over
    position = position.cpu()
    order = np.lexsort((position[:, 1].numpy(), position[:, 0].numpy()))
    order = order[~certain[order]]
    steps = np.concatenate([[0.0], pi[order].cumsum()])
    if rest > 0:
        steps *= rest / steps[-1]
    start = torch.rand((), generator=generator(seed), dtype=torch.float64).item()
    drawn = np.floor(steps[1:] - start) > np.floor(steps[:-1] - start)
    rows = np.concatenate([np.flatnonzero(certain), order[drawn]])
    return torch.from_numpy(rows), torch.from_numpy(1 / (n * pi[rows]))
