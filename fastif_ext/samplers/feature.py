"""The paper's feature samplers."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext import ops
from fastif_ext.blocks import as_tensor
from fastif_ext.device import memory_for, with_kernels
from fastif_ext.extract import extract
from fastif_ext.kmeans import KMeans
from fastif_ext.samplers.base import SubsetSampler, check_size
from fastif_ext.samplers.drive import drive
from fastif_ext.samplers.fold import ColumnFold
from fastif_ext.stream import ExtractedBatch, Layer


class FeatureSampler(SubsetSampler):
    """The paper's feature samplers: k-means in feature space, then rows of every cluster.

    ``mode="nearest"`` takes the rows nearest to each centroid; ``mode="distance"`` draws rows of
    each cluster with probability falling with their distance (1/d). Clusters share m equally; what
    a small cluster cannot give goes to the others. Weights are 1/m, as in the paper.

    Args:
        features: [n, d]; of the model itself or of any other network. An array mapped from a file,
            np.memmap or a store's (see fastif_ext.extract), may be larger than memory.
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
        self,
        features: Tensor | np.ndarray,
        m: int,
        *,
        n_clusters: int,
        mode: str = "nearest",
        seed: int = 0,
    ) -> None:
        fold = FeatureFold(m, n_clusters=n_clusters, mode=mode, seed=seed)
        fold.take(features)
        super().__init__(*fold.subset())

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
        state: str | os.PathLike[str] | None = None,
        store: str | os.PathLike[str] | None = None,
    ) -> FeatureSampler:
        """The same sampler on features taken in one pass over a loader; they are kept.

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
            state: a file that keeps what was read, to go on after an interruption; see
                fastif_ext.samplers.drive. The features of all rows are in memory and in it.
            store: instead, a folder that keeps logits and features, as in fastif_ext.extract: for
                features larger than memory. It goes on after an interruption, too.
        """
        if layer is None:
            raise ValueError("FeatureSampler: layer is None; name the layer the features come from")
        if store is not None:
            if state is not None:
                raise ValueError("FeatureSampler: pass state or store, not both; store goes on too")
            got = extract(model, loader, layer=layer, device=device, progress=progress, store=store)
            assert got.features is not None
            clusters = got.logits.shape[1] if n_clusters is None else n_clusters
            return cls(got.features, m, n_clusters=clusters, mode=mode, seed=seed)
        fold = FeatureFold(m, n_clusters=n_clusters, mode=mode, seed=seed)
        sampler: FeatureSampler = drive(
            fold, model, loader, layer=layer, device=device, progress=progress, state=state
        )
        return sampler


class FeatureFold(ColumnFold):
    """The features of each row: n d numbers, as k-means needs several passes over them."""

    sampler = FeatureSampler

    def __init__(
        self, m: int, *, n_clusters: int | None = None, mode: str = "nearest", seed: int = 0
    ) -> None:
        if mode not in ("nearest", "distance"):
            raise ValueError(f"FeatureSampler: mode must be 'nearest' or 'distance', got {mode!r}")
        super().__init__(("features",), m=m, n_clusters=n_clusters, mode=mode, seed=seed)
        self.m, self.n_clusters, self.mode, self.seed = m, n_clusters, mode, seed
        self._classes = 0

    def take(self, features: Tensor | np.ndarray) -> None:
        """All rows at once; they are not copied."""
        rows: Tensor = as_tensor(features).detach()
        self.columns["features"].append(rows)
        self._count(0, len(features))

    def _rows(self, batch: ExtractedBatch) -> tuple[Tensor, ...]:
        if batch.features is None:
            raise ValueError("FeatureSampler: the batch holds no features; name a layer")
        self._classes = batch.logits.shape[1]
        return (with_kernels(batch.features),)

    def _merge(self, other: Any) -> None:
        super()._merge(other)
        self._classes = other._classes

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "classes": self._classes}

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self._classes = state["classes"]

    def _draw(self) -> tuple[Tensor, None]:
        check_size(self.name, self.rows, self.m)
        clusters = self._classes if self.n_clusters is None else self.n_clusters
        if not 1 <= clusters <= self.m:
            raise ValueError(
                f"FeatureSampler: n_clusters must be between 1 and m = {self.m}, got {clusters}; "
                f"every cluster gives at least one row"
            )
        with memory_for(
            f"the features of {self.rows} rows",
            "take them with fastif_ext.extract, which keeps them on the CPU, and pass those",
        ):
            features = self.columns["features"].tensor()
        kmeans = KMeans(clusters, seed=self.seed).fit(features)
        counts = kmeans.labels_.bincount(minlength=clusters).cpu()
        quota = _equal_shares(counts, self.m)
        k, centers = int(quota.max()), kmeans.cluster_centers_
        if self.mode == "nearest":
            index, _ = ops.kmeans_nearest(features, centers, k)
        else:
            index = ops.kmeans_weighted(features, centers, k, seed=self.seed)
        return index.cpu()[torch.arange(k) < quota[:, None]], None


def _equal_shares(counts: Tensor, m: int) -> Tensor:
    """m rows dealt out one by one in turn to the clusters that still have some."""
    quota = torch.zeros_like(counts)
    while (left := m - int(quota.sum())) > 0:
        able = (quota < counts).nonzero().flatten()
        share = max(left // len(able), 1)
        chosen = able[: min(left, len(able))]
        quota[chosen] = torch.minimum(quota[chosen] + share, counts[chosen])
    return quota
