"""Samplers that draw by size with Horvitz-Thompson weights: curvature and residual."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext import ops
from fastif_ext.device import with_kernels
from fastif_ext.extract import Layer, stream
from fastif_ext.samplers.base import (
    SubsetSampler,
    check_labels,
    check_logits,
    check_size,
    generator,
)


class CurvatureSampler(SubsetSampler):
    """Rows drawn by how much curvature they carry, with Horvitz-Thompson weights.

    The softmax Hessian of row i is diag(p_i) - p_i p_i^T; its trace b_i = 1 - sum_y p_iy^2 is large
    for rows near a decision boundary and near zero for confident ones. Rows are drawn with size

        f_i = b_i row_scale_i + floor,   floor such that a share `uniform` of sum f is uniform,

    and weighted 1 / (n pi_i), which makes H_S an unbiased estimate of the mean Hessian.

    Args:
        logits: [n, Y].
        m: rows to draw, 1 <= m <= n, each at most once.
        uniform: share of the uniform part, in [0, 1]; it keeps weights below about 1/(uniform m).
        row_scale: [n], non-negative, multiplies b_i; |features_i|^2 + 1 suits a linear head.
        method: "bottom-k" (successive sampling; pi_i from the threshold) or "systematic" (PPS in
            fixed steps over rows ordered along the decision boundaries; pi_i proportional to f_i).
            Systematic sampling spreads the rows evenly over all boundaries; on digits it cuts the
            error of H_S v by a third to a half (python_tests/test_acceptance.py).
        seed: the same seed draws the same rows.

    Raises:
        ValueError: NaN logits, m, uniform or method out of range.

    Example:
        >>> import torch, fastif_ext as fi
        >>> sampler = fi.CurvatureSampler(4 * torch.randn(1000, 10), 50, seed=0)
        >>> sampler, bool(0.5 < sampler.weights.sum() < 2)  # 1 in the mean
        (CurvatureSampler(50 of 1000 rows), True)
    """

    def __init__(
        self,
        logits: Tensor,
        m: int,
        *,
        uniform: float = 0.3,
        row_scale: Tensor | None = None,
        method: str = "bottom-k",
        seed: int = 0,
    ) -> None:
        logits = check_logits("CurvatureSampler", logits)
        sizes = ops.curvature_sizes(logits, row_scale=row_scale)
        order = _boundary_position(logits) if method == "systematic" else None
        self._finish(sizes, order, m, uniform, method, seed)

    @classmethod
    def from_loader(
        cls,
        model: nn.Module,
        loader: DataLoader[Any],
        m: int,
        *,
        uniform: float = 0.3,
        layer: Layer = None,
        method: str = "bottom-k",
        seed: int = 0,
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> CurvatureSampler:
        """The same sampler in one pass over a loader; one float per row is kept.

        Args:
            model: maps inputs to logits; see fastif_ext.extract.
            loader: a DataLoader that does not shuffle.
            m: rows to draw.
            uniform: share of the uniform part.
            layer: where given, row_scale is |features|^2 + 1 of this layer ("penultimate" for the
                curvature of a linear head).
            method: "bottom-k" or "systematic".
            seed: the same seed draws the same rows.
            device: where the model runs.
            progress: show a progress bar.
        """
        sizes, positions = [], []
        for batch in stream(model, loader, layer=layer, device=device, progress=progress):
            logits = with_kernels(batch.logits)
            logits = check_logits("CurvatureSampler", logits, first_row=batch.row_offset)
            scale = None if batch.features is None else batch.features.square().sum(1) + 1
            scale = None if scale is None else scale.to(logits.device)
            sizes.append(ops.curvature_sizes(logits, row_scale=scale))
            if method == "systematic":
                positions.append(_boundary_position(logits))
        if not sizes:
            raise ValueError("CurvatureSampler: loader gave no batch")
        sampler = cls.__new__(cls)
        order = torch.cat(positions) if positions else None
        sampler._finish(torch.cat(sizes), order, m, uniform, method, seed)
        return sampler

    def _finish(
        self,
        sizes: Tensor,
        position: Tensor | None,
        m: int,
        uniform: float,
        method: str,
        seed: int,
    ) -> None:
        check_size("CurvatureSampler", len(sizes), m)
        sizes = _mixture("CurvatureSampler", sizes, m, uniform)
        if method == "bottom-k":
            rows, weights = _horvitz_thompson(sizes, m, seed)
        elif method == "systematic":
            assert position is not None
            rows, weights = _systematic(sizes, position, m, seed)
        else:
            raise ValueError(
                f"CurvatureSampler: method must be 'bottom-k' or 'systematic', got {method!r}"
            )
        SubsetSampler.__init__(self, len(sizes), rows, weights)


class ResidualSampler(SubsetSampler):
    """Rows for the mean gradient over a set, drawn by residual norm |p_i - e_y|, weighted by 1/pi.

    A row's gradient through a softmax is proportional to its residual; a few hundred of them stand
    for the whole removal set. Weights are Horvitz-Thompson: sum_j w_j g_j is unbiased for the mean.

    Args:
        logits: [n, Y] of the rows of the set.
        labels: int64 [n].
        m: rows to draw, 1 <= m <= n.
        uniform: share of the uniform part, in [0, 1].
        seed: the same seed draws the same rows.

    Raises:
        ValueError: NaN logits, labels out of range, m or uniform out of range.

    Example:
        >>> import torch, fastif_ext as fi
        >>> fi.ResidualSampler(torch.randn(100, 3), torch.arange(100) % 3, 10, seed=0)
        ResidualSampler(10 of 100 rows)
    """

    def __init__(
        self, logits: Tensor, labels: Tensor, m: int, *, uniform: float = 0.2, seed: int = 0
    ) -> None:
        logits = check_logits("ResidualSampler", logits)
        n, classes = logits.shape
        labels = check_labels("ResidualSampler", labels, n=n, classes=classes)
        check_size("ResidualSampler", n, m)
        residual = logits.softmax(1, dtype=torch.float64)
        labels = labels.to(logits.device)
        residual.scatter_add_(1, labels[:, None], residual.new_full((n, 1), -1.0))
        sizes = _mixture("ResidualSampler", residual.norm(dim=1).float(), m, uniform)
        super().__init__(n, *_horvitz_thompson(sizes, m, seed))


def _mixture(sampler: str, sizes: Tensor, m: int, uniform: float) -> Tensor:
    """The sizes plus a constant that makes up the share `uniform` of their sum, on the CPU.

    There the sum has one order, so that the same sizes give the same rows on every device.
    """
    sizes = sizes.cpu()
    if not 0 <= uniform <= 1:
        raise ValueError(f"{sampler}: uniform must be between 0 and 1, got {uniform}")
    mean = sizes.numpy().mean(dtype=np.float64)  # numpy sums in one order on any threads
    if uniform == 1 or (mean == 0 and uniform > 0):
        return torch.ones_like(sizes)
    positive = int((sizes > 0).sum())
    if uniform == 0 and positive < m:
        raise ValueError(
            f"{sampler}: m = {m}, but only {positive} rows have positive size; take uniform > 0"
        )
    return sizes + float(mean * uniform / (1 - uniform))


def _horvitz_thompson(sizes: Tensor, m: int, seed: int) -> tuple[Tensor, Tensor]:
    """m distinct rows by bottom-k on the sizes, with weights 1 / (n pi)."""
    sample = ops.bottom_k(sizes, m, seed=seed)
    pi = ops.inclusion_probability(sizes[sample.rows].double(), sample.log_threshold)
    return sample.rows, 1 / (len(sizes) * pi)


def _systematic(sizes: Tensor, position: Tensor, m: int, seed: int) -> tuple[Tensor, Tensor]:
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


def _boundary_position(logits: Tensor) -> Tensor:
    """Where each row stands along the decision boundaries, float64 [n, 2].

    First the unordered pair of its two most likely classes, which names the boundary; then the
    difference of their logits, which tells the side and the distance.
    """
    n, classes = logits.shape
    if classes < 2:
        return torch.zeros(n, 2, dtype=torch.float64, device=logits.device)
    first = logits.argmax(1, keepdim=True)  # of equal ones the first, on every device, unlike topk
    second = logits.scatter(1, first, -torch.inf).argmax(1, keepdim=True)
    pair = torch.cat([first, second], 1).sort(dim=1).values
    margin = logits.gather(1, pair).double()
    boundary = (pair[:, 0] * classes + pair[:, 1]).double()
    return torch.stack([boundary, (margin[:, 1] - margin[:, 0]).nan_to_num()], dim=1)
