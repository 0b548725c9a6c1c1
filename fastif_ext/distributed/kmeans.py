"""k-means over rows that ranks share, the same centers on any number of ranks."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastif_ext.blocks import Blocks
from fastif_ext.distributed.ranks import Ranks, opened
from fastif_ext.kmeans import KMeans
from fastif_ext.lloyd import center_dtype, means, total
from fastif_ext.ops import kmeans_assign, kmeans_candidates, kmeans_update

BLOCK = 1 << 22  # numbers of x that are held a second time, as integers


def kmeans(
    x: Tensor,
    n_clusters: int,
    *,
    init: str | Tensor = "k-means++",
    max_iter: int = 100,
    tol: float = 1e-4,
    seed: int = 0,
    group: dist.ProcessGroup | Ranks | None = None,
) -> KMeans:
    """Lloyd's algorithm on the rows of all ranks, seeded by greedy k-means++.

    The centers are a function of all rows in rank order and the seed, bit for bit: the number of
    ranks and where the rows are cut do not matter. For that, every sum is one of integers, exact in
    float64 in any order: a column counts in units of n / 2^52 of its largest entry (as a power of
    two), so that the numbers of a million rows keep 32 bits, those of a billion 22. From the same
    first centers they agree with those of fastif_ext.KMeans to rounding; only, a center whose
    cluster is empty stays where it is.

    Args:
        x: this rank's rows, [n_r, d], n_r may be 0; float32, float64, float16 or bfloat16, finite.
        n_clusters: K, at most the number of all rows.
        init: "k-means++", or the first centers [K, d], the same on all ranks.
        max_iter: at most this many updates of the centers.
        tol: as for fastif_ext.KMeans.
        seed: of the seeding.
        group: a process group, the default one if None; or Ranks, which have a timeout.

    Returns:
        A fitted fastif_ext.KMeans: cluster_centers_, inertia_ and n_iter_ of all rows, labels_ of
        this rank's.

    Raises:
        TypeError, ValueError: x does not fit; the message names it.
        RankError: ranks disagree, one failed, or one does not come.

    Example:
        >>> import torch, torch.distributed as dist, fastif_ext as fi
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> fi.distributed.kmeans(x, 2).cluster_centers_.sort(0).values
        tensor([[ 0.5000],
                [10.5000]])
        >>> dist.destroy_process_group()
    """
    ranks = opened(group)
    with ranks.telling("kmeans"):
        model = KMeans(n_clusters, init=init, max_iter=max_iter, tol=tol, seed=seed)
        model._check_data("kmeans", Blocks("kmeans", x), None, rows=0)
    lengths = ranks.meet(
        "kmeans",
        len(x),
        columns=x.shape[1],
        dtype=x.dtype,
        n_clusters=n_clusters,
        init=init,
        max_iter=max_iter,
        tol=tol,
        seed=seed,
    )
    if sum(lengths) < n_clusters:
        raise ValueError(
            f"kmeans: all ranks together have {sum(lengths)} rows, fewer than n_clusters = "
            f"{n_clusters}; pass more rows or choose fewer clusters"
        )
    with ranks.telling("kmeans"):
        _fit(model, _Rows(x, sum(lengths), ranks))
    return model


class _Rows:
    """This rank's rows, and sums over those of all ranks that are exact in any order."""

    def __init__(self, x: Tensor, n: int, ranks: Ranks) -> None:
        self.x, self.n, self.ranks = x, n, ranks
        size = x.abs().amax(0) if len(x) else x.new_zeros(x.shape[1])
        size = ranks.all_reduce("kmeans: largest", size.to(center_dtype(x)), maximum=True)
        self._units = torch.tensor(
            [_unit(value, n) for value in size.tolist()], dtype=torch.float64, device=x.device
        )

    def sums(self, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
        """The sum of the rows of each cluster, and their number, float64."""
        found = self.x.new_zeros(clusters, self.x.shape[1] + 1, dtype=torch.float64)
        step = max(1, BLOCK // max(1, self.x.shape[1]))
        for rows, own in zip(self.x.split(step), labels.split(step), strict=True):
            sums, counts = kmeans_update((rows.double() / self._units).round(), own, clusters)
            found[:, :-1] += sums
            found[:, -1] += counts
        found = self.ranks.all_reduce("kmeans: sums", found)
        return found[:, :-1] * self._units, found[:, -1]

    def totals(self, values: Tensor) -> Tensor:
        """The sums of [R, n_r] values over all rows, float64 [R]."""
        size = values.amax() if values.numel() else values.new_zeros(())
        unit = _unit(float(self.ranks.all_reduce("kmeans: largest", size, maximum=True)), self.n)
        whole = (values.double() / unit).round().sum(1)
        return self.ranks.all_reduce("kmeans: totals", whole) * unit

    def draw(self, mass: Tensor, uniform: list[float]) -> Tensor:
        """A row for each uniform number, with probability proportional to mass [n_r]: [t, d]."""
        size = mass.amax() if len(mass) else mass.new_zeros(())
        top = float(self.ranks.all_reduce("kmeans: largest", size, maximum=True))
        if top == 0:  # fewer distinct rows than centers: any will do
            mass, top = torch.ones_like(mass), 1.0
        share = (mass.double() / _unit(top, self.n)).round().long()
        cumulative = share.cumsum(0)
        own = int(cumulative[-1]) if len(mass) else 0
        totals = self.ranks.meet("kmeans: draw", own)
        before, everything = sum(totals[: self.ranks.rank]), sum(totals)
        rows = self.x.new_zeros(len(uniform), self.x.shape[1], dtype=center_dtype(self.x))
        for i, u in enumerate(uniform):
            place = min(int(u * everything), everything - 1) - before
            if 0 <= place < own:
                at = torch.searchsorted(cumulative, place, right=True)
                rows[i] = self.x[at].to(rows.dtype)
        return self.ranks.all_reduce("kmeans: candidates", rows)  # of one rank each, 0 of others


class _State(NamedTuple):
    centers: Tensor
    labels: Tensor
    sqdist: Tensor


def _fit(model: KMeans, rows: _Rows) -> None:
    x, k = rows.x, model.n_clusters
    none = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    sums, _ = rows.sums(none, 1)
    _, spread = kmeans_assign(x, (sums / rows.n).to(center_dtype(x)))
    movement = model.tol * float(rows.totals(spread[None])) / max(1, rows.n * x.shape[1])
    if isinstance(model.init, Tensor):
        centers = model.init.to(device=x.device, dtype=center_dtype(x), copy=True)
    else:
        centers = _plus_plus(rows, k, model._generator())
    now = _State(centers, *kmeans_assign(x, centers))
    model.n_iter_, settled = 0, False
    while model.n_iter_ < model.max_iter and not settled:
        centers = means(*rows.sums(now.labels, k), now.centers)
        then = _State(centers, *kmeans_assign(x, centers))
        moved = total((centers - now.centers).double().square().flatten())
        changed = (then.labels != now.labels).any().to(torch.uint8)
        changed = rows.ranks.all_reduce("kmeans: changed", changed, maximum=True)
        settled = moved <= movement or not changed
        now = then
        model.n_iter_ += 1
    model.cluster_centers_, model.labels_ = now.centers, now.labels
    model.inertia_ = float(rows.totals(now.sqdist[None]))
    model._sums, model._mass = rows.sums(now.labels, k)
    found = int((model._mass > 0).sum())
    if found < k:
        warnings.warn(
            f"kmeans: only {found} of n_clusters = {k} clusters have a row; try another seed, or "
            f"fewer clusters",
            stacklevel=3,
        )


def _plus_plus(rows: _Rows, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ over the rows of all ranks, as fastif_ext.lloyd.plus_plus_rows."""
    x, trials = rows.x, 2 + int(math.log(n_clusters))
    sqdist = torch.full((len(x),), math.inf, dtype=center_dtype(x), device=x.device)
    mass, centers = torch.ones_like(sqdist), []
    for count in [1] + [trials] * (n_clusters - 1):
        uniform = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
        candidates = rows.draw(mass, uniform)
        least, _ = kmeans_candidates(x, candidates.to(x.dtype), sqdist)
        best = int(rows.totals(least).argmin())
        centers.append(candidates[best])
        sqdist = mass = least[best]
    return torch.stack(centers)


def _unit(largest: float, n: int) -> float:
    """A power of two: n numbers up to the largest are integers of it whose sums are exact."""
    exponent = math.frexp(largest)[1]  # largest < 2^exponent
    return math.ldexp(1.0, max(exponent + math.ceil(math.log2(max(n, 1))) - 52, -1000))
