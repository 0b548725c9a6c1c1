"""The paper's feature samplers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext import ops
from fastif_ext.device import memory_for, with_kernels
from fastif_ext.extract import Layer, stream
from fastif_ext.kmeans import KMeans
from fastif_ext.samplers.base import SubsetSampler, check_size


class FeatureSampler(SubsetSampler):
    """The paper's feature samplers: k-means in feature space, then rows of every cluster.

    ``mode="nearest"`` takes the rows nearest to each centroid; ``mode="distance"`` draws rows of
    each cluster with probability falling with their distance (1/d). Clusters share m equally; what
    a small cluster cannot give goes to the others. Weights are 1/m, as in the paper.

    Args:
        features: [n, d]; of the model itself or of any other network.
        m: rows to draw, n_clusters <= m <= n.
        n_clusters: number of k-means centroids; the paper uses the number of classes.
        mode: "nearest" or "distance".
        seed: of the centroids' initialisation and of the draw.

    Raises:
        ValueError: features with NaN, m, n_clusters or mode out of range.

    Example:
        >>> import torch, fastif_ext as fi
        >>> fi.FeatureSampler(torch.randn(200, 8), 20, n_clusters=4, mode="nearest", seed=0)
        FeatureSampler(20 of 200 rows)
    """

    def __init__(
        self, features: Tensor, m: int, *, n_clusters: int, mode: str = "nearest", seed: int = 0
    ) -> None:
        if mode not in ("nearest", "distance"):
            raise ValueError(f"FeatureSampler: mode must be 'nearest' or 'distance', got {mode!r}")
        features = features.detach()
        n = len(features)
        check_size("FeatureSampler", n, m)
        if not 1 <= n_clusters <= m:
            raise ValueError(
                f"FeatureSampler: n_clusters must be between 1 and m = {m}, got {n_clusters}; "
                f"every cluster gives at least one row"
            )
        kmeans = KMeans(n_clusters, seed=seed).fit(features)
        counts = kmeans.labels_.bincount(minlength=n_clusters).cpu()
        quota = _equal_shares(counts, m)
        k, centers = int(quota.max()), kmeans.cluster_centers_
        if mode == "nearest":
            index, _ = ops.kmeans_nearest(features, centers, k)
        else:
            index = ops.kmeans_weighted(features, centers, k, seed=seed)
        super().__init__(n, index.cpu()[torch.arange(k) < quota[:, None]])

    @classmethod
    def from_loader(
        cls,
        model: nn.Module,
        loader: DataLoader[Any],
        m: int,
        *,
        n_clusters: int | None = None,
        layer: Layer = "penultimate",
        mode: str = "nearest",
        seed: int = 0,
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> FeatureSampler:
        """The same sampler on features taken in one pass over a loader.

        Args:
            model: maps inputs to logits; see fastif_ext.extract.
            loader: a DataLoader that does not shuffle.
            m: rows to draw.
            n_clusters: by default the number of classes, the width of the logits.
            layer: where the features come from, as in fastif_ext.extract.
            mode: "nearest" or "distance".
            seed: of the centroids' initialisation and of the draw.
            device: where the model runs.
            progress: show a progress bar.
        """
        if layer is None:
            raise ValueError("FeatureSampler: layer is None; name the layer the features come from")
        features, classes = [], 0
        for batch in stream(model, loader, layer=layer, device=device, progress=progress):
            assert batch.features is not None
            features.append(with_kernels(batch.features))
            classes = batch.logits.shape[1]
        if not features:
            raise ValueError("FeatureSampler: loader gave no batch")
        n = sum(map(len, features))
        with memory_for(
            f"the features of {n} rows",
            "take them with fastif_ext.extract, which keeps them on the CPU, and pass those",
        ):
            rows = torch.cat(features)
            return cls(rows, m, n_clusters=n_clusters or classes, mode=mode, seed=seed)


def _equal_shares(counts: Tensor, m: int) -> Tensor:
    """m rows dealt out one by one in turn to the clusters that still have some."""
    quota = torch.zeros_like(counts)
    while (left := m - int(quota.sum())) > 0:
        able = (quota < counts).nonzero().flatten()
        share = max(left // len(able), 1)
        chosen = able[: min(left, len(able))]
        quota[chosen] = torch.minimum(quota[chosen] + share, counts[chosen])
    return quota
