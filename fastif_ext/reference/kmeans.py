"""Pure-PyTorch twins of the k-means operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def kmeans_assign(
    x: Tensor, centroids: Tensor, *, precision: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Twin of fastif_ext.kmeans_assign: all n x K distances in float64, directly summed."""
    finite = centroids.isfinite().all(1)
    rows, centres = x.double(), centroids.double().nan_to_num(0.0, 0.0, 0.0)
    sqdist = torch.stack([(rows - c).square().sum(1) for c in centres], dim=1)
    sqdist[:, ~finite] = math.nan
    overflow = torch.finfo(torch.float64).max  # equal among themselves, above all others
    least, labels = sqdist.nan_to_num(math.inf, overflow).min(1)
    least = least.to(_sum_dtype(x))
    unlabelled = ~x.isfinite().all(1) | (~finite).all()
    return labels.masked_fill(unlabelled, -1), least.masked_fill(unlabelled, math.nan)


def kmeans_update(
    x: Tensor, labels: Tensor, n_clusters: int, *, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Twin of fastif_ext.kmeans_update: index_add_ in float64."""
    kept = labels >= 0
    rows = x[kept].double()
    if weight is not None:
        rows = rows * weight[kept].double()[:, None]
    sums = torch.zeros(n_clusters, x.shape[1], dtype=torch.float64, device=x.device)
    sums.index_add_(0, labels[kept], rows)
    counts = torch.bincount(labels[kept], minlength=n_clusters)
    return sums.to(_sum_dtype(x)), counts


def kmeans_candidates(
    x: Tensor, candidates: Tensor, sqdist: Tensor, *, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Twin of fastif_ext.ops.kmeans_candidates, in float64."""
    distance = (x.double()[None] - candidates.double()[:, None]).square().sum(2)
    least = torch.where(distance < sqdist, distance, sqdist.double())
    potential = (least if weight is None else least * weight).sum(1)
    return least.to(sqdist.dtype), potential


def _smallest(key: Tensor, labels: Tensor, n_clusters: int, k: int) -> Tensor:
    """The rows of the k smallest keys of each cluster, ties to the lower row, padded with -1."""
    index = torch.full((n_clusters, k), -1, dtype=torch.int64, device=key.device)
    for j in range(n_clusters):
        members = (labels == j).nonzero()[:, 0]
        chosen = members[key[members].sort(stable=True).indices[:k]]
        index[j, : len(chosen)] = chosen
    return index


def kmeans_nearest(x: Tensor, centroids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Twin of fastif_ext.kmeans_nearest: a stable sort for each cluster."""
    labels, sqdist = kmeans_assign(x, centroids)
    index = _smallest(sqdist, labels, centroids.shape[0], k)
    inf = torch.tensor(math.inf, dtype=sqdist.dtype, device=x.device)
    if len(x) == 0:
        return index, inf.expand(index.shape)
    return index, torch.where(index < 0, inf, sqdist[index])


def _philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 (Salmon et al. 2011) in Python's integers."""
    word = 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (b >> 32) ^ counter[1] ^ key[0],
            b & word,
            (a >> 32) ^ counter[3] ^ key[1],
            a & word,
        ]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return counter


def _uniform(seed: int, element: int) -> float:
    """The uniform in (0, 1) of a global element."""
    word = 0xFFFFFFFF
    position = element // 64 * 16 + element % 16
    key = [seed & word, (seed >> 32) & word]
    high, low = (
        _philox4x32([position & word, position >> 32, extra, 0], key)[element // 16 % 4]
        for extra in (0, 1)
    )
    if high >= 1 << 12:
        return (high + 0.5) * 2.0**-32
    return ((high << 32) + low + 0.5) * 2.0**-64


def kmeans_weighted(x: Tensor, centroids: Tensor, k: int, *, seed: int) -> Tensor:
    """Twin of fastif_ext.kmeans_weighted: one exponential per row, a stable sort per cluster."""
    labels, sqdist = kmeans_assign(x, centroids)
    exponential = torch.tensor(
        [-math.log1p(-_uniform(seed, i)) for i in range(len(x))], dtype=torch.float64
    ).to(x.device)
    return _smallest(exponential * sqdist.double().sqrt(), labels, centroids.shape[0], k)
