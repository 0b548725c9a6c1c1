"""Curvature sampling: rows drawn by the size of their softmax Hessian."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext import ops
from fastif_ext.device import with_kernels
from fastif_ext.samplers.base import SubsetSampler, check_logits, check_size, row_blocks
from fastif_ext.samplers.drive import drive
from fastif_ext.samplers.fold import ColumnFold
from fastif_ext.samplers.sizes import bottom_k, check_seed, check_share, mixture, systematic
from fastif_ext.stream import ExtractedBatch, Layer


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
        fold = CurvatureFold(m, uniform=uniform, method=method, seed=seed)
        fold.take(logits, row_scale)
        super().__init__(*fold.subset())

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
        state: str | os.PathLike[str] | None = None,
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
            state: a file that keeps what was read, to go on after an interruption; see
                fastif_ext.samplers.drive.
        """
        fold = CurvatureFold(m, uniform=uniform, method=method, seed=seed)
        sampler: CurvatureSampler = drive(
            fold, model, loader, layer=layer, device=device, progress=progress, state=state
        )
        return sampler


class CurvatureFold(ColumnFold):
    """The size of each row, and for systematic sampling its place along the boundaries.

    4 bytes a row, or 20. Features in a batch give the row scale |features|^2 + 1.
    """

    sampler = CurvatureSampler

    def __init__(
        self, m: int, *, uniform: float = 0.3, method: str = "bottom-k", seed: int = 0
    ) -> None:
        if method not in ("bottom-k", "systematic"):
            raise ValueError(
                f"CurvatureSampler: method must be 'bottom-k' or 'systematic', got {method!r}"
            )
        check_share("CurvatureSampler", uniform)
        check_seed("CurvatureSampler", seed)
        columns = ("sizes", "position") if method == "systematic" else ("sizes",)
        super().__init__(columns, m=m, uniform=uniform, method=method, seed=seed)
        self.m, self.uniform, self.seed = m, uniform, seed

    def take(self, logits: Tensor, row_scale: Tensor | None) -> None:
        """All rows at once, with a scale of one's own."""
        logits = check_logits(self.name, logits)
        self._append(self._measure(logits, row_scale))
        self._count(0, len(logits))

    def _rows(self, batch: ExtractedBatch) -> tuple[Tensor, ...]:
        logits = check_logits(self.name, with_kernels(batch.logits), first_row=batch.row_offset)
        features = batch.features
        if features is not None and features.dtype.itemsize < 4:
            features = features.float()  # float16's squares end at 65504
        scale = None if features is None else features.square().sum(1) + 1
        return self._measure(logits, None if scale is None else scale.to(logits.device))

    def _measure(self, logits: Tensor, row_scale: Tensor | None) -> tuple[Tensor, ...]:
        sizes = ops.curvature_sizes(logits, row_scale=row_scale).cpu()
        return (sizes, boundary_position(logits).cpu()) if len(self.columns) > 1 else (sizes,)

    def _draw(self) -> tuple[Tensor, Tensor]:
        check_size(self.name, self.rows, self.m)
        sizes = mixture(self.name, self.columns["sizes"].tensor(), self.m, self.uniform)
        if "position" in self.columns:
            return systematic(sizes, self.columns["position"].tensor(), self.m, self.seed)
        return bottom_k(sizes, self.m, self.seed)


def boundary_position(logits: Tensor) -> Tensor:
    """Where each row stands along the decision boundaries, float64 [n, 2].

    First the unordered pair of its two most likely classes, which names the boundary; then the
    difference of their logits, which tells the side and the distance.
    """
    n, classes = logits.shape
    place = torch.zeros(n, 2, dtype=torch.float64, device=logits.device)
    if classes < 2:
        return place
    for rows in row_blocks(logits):
        block = logits[rows]
        first = block.argmax(1, keepdim=True)  # of equal ones the first everywhere, unlike topk
        second = block.scatter(1, first, -torch.inf).argmax(1, keepdim=True)
        pair = torch.cat([first, second], 1).sort(dim=1).values
        margin = block.gather(1, pair).double()
        place[rows, 0] = (pair[:, 0] * classes + pair[:, 1]).double()
        place[rows, 1] = (margin[:, 1] - margin[:, 0]).nan_to_num()
    return place
