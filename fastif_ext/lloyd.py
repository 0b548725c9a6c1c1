"""Seeding and Lloyd's algorithm, as functions: what the KMeans estimator is made of.

Every sum goes through the k-means operators or a cumulative sum in a fixed order, so that results
are the same bits for any number of threads, and on a GPU from call to call. On a GPU nothing waits
for it but one check per iteration.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastif_ext.blocks import Blocks, joined
from fastif_ext.ops import kmeans_assign, kmeans_candidates
from fastif_ext.ops.kmeans import kmeans_update_unchecked as kmeans_update


class Run(NamedTuple):
    """One run of Lloyd's algorithm."""

    centers: Tensor
    labels: Tensor
    inertia: float
    iterations: int
    sums: Tensor
    """Of the weighted rows of each cluster, float64 [K, d]."""
    mass: Tensor
    """Of their weights, float64 [K]."""


def center_dtype(x: Tensor | Blocks) -> torch.dtype:
    """The dtype of the centers for x: float32, or float64 for float64 x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _total(values: Tensor) -> Tensor:
    """The sum of [n] values in float64, in an order that does not depend on threads."""
    sums, _ = kmeans_update(
        values.double()[:, None], torch.zeros_like(values, dtype=torch.int64), 1
    )
    result: Tensor = sums[0, 0]
    return result


def total(values: Tensor, weight: Tensor | None = None) -> float:
    """The weighted sum of [n] values in float64, in an order that does not depend on threads."""
    return float(_total(values if weight is None else values.double() * weight))


def mean_variance(x: Blocks) -> float:
    """The mean over columns of the variance of x, in a fixed order of summation."""
    if x.columns == 0:
        return 0.0
    sums = torch.zeros(1, x.columns, dtype=torch.float64, device=x.device)
    for _, block in x:
        sums += kmeans_update(block, torch.zeros(len(block), dtype=torch.int64).to(x.device), 1)[0]
    mean = (sums / x.rows).to(center_dtype(x))
    sqdist = torch.empty(x.rows, dtype=mean.dtype, device=x.device)
    for rows, block in x:
        sqdist[rows] = kmeans_assign(block, mean)[1]
    return total(sqdist) / (x.rows * x.columns)


def sums_and_mass(
    x: Tensor, labels: Tensor, weight: Tensor | None, n_clusters: int
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the rows of each cluster and the sum of their weights, float64."""
    sums, counts = kmeans_update(x, labels, n_clusters, weight=weight)
    if weight is None:
        return sums.double(), counts.double()
    mass, _ = kmeans_update(weight.double()[:, None], labels, n_clusters)
    return sums.double(), mass[:, 0]


def means(sums: Tensor, mass: Tensor, centers: Tensor) -> Tensor:
    """The new centers; where a cluster has no mass, the old one."""
    means = (sums / mass[:, None]).to(centers.dtype)
    return torch.where(mass[:, None] > 0, means, centers)


class Pass(NamedTuple):
    """The rows joined to their nearest centers, and what the next centers are made of."""

    labels: Tensor
    sqdist: Tensor
    sums: Tensor
    mass: Tensor


def join_nearest(x: Blocks, weight: Tensor | None, centers: Tensor) -> Pass:
    """One reading of x."""
    labels = torch.empty(x.rows, dtype=torch.int64, device=x.device)
    sqdist = torch.empty(x.rows, dtype=centers.dtype, device=x.device)
    sums = torch.zeros_like(centers, dtype=torch.float64)
    mass = sums.new_zeros(len(centers))
    for rows, block in x:
        labels[rows], sqdist[rows] = kmeans_assign(block, centers)
        part, part_mass = sums_and_mass(
            block, labels[rows], None if weight is None else weight[rows], len(centers)
        )
        sums += part
        mass += part_mass
    return Pass(labels, sqdist, sums, mass)


def lloyd(x: Blocks, weight: Tensor | None, centers: Tensor, max_iter: int, movement: float) -> Run:
    """Lloyd's algorithm from the given centers; labels and inertia belong to the last centers."""
    now = join_nearest(x, weight, centers)
    iterations = 0
    # Whether to take for granted that no cluster is empty: to look first would wait for the GPU.
    hopeful = x.device.type == "cuda"
    while iterations < max_iter:
        filled = (now.mass > 0).all()
        if not hopeful and not filled:
            _relocate_empty(x, weight, now)
        new_centers = means(now.sums, now.mass, centers)
        new = join_nearest(x, weight, new_centers)
        moved = _total((new_centers - centers).double().square().flatten())
        found, *settled = torch.stack(
            [filled, moved <= movement, (new.labels == now.labels).all()]
        ).tolist()
        if hopeful and not found:
            hopeful = False
            continue
        iterations += 1
        centers, now = new_centers, new
        if any(settled):
            break
    return Run(centers, now.labels, total(now.sqdist, weight), iterations, now.sums, now.mass)


def _relocate_empty(x: Blocks, weight: Tensor | None, now: Pass) -> None:
    """Moves the rows farthest from their centers, one each, to the empty clusters.

    Changes sums and mass in place. Rows without weight, rows on their center, and the last row of a
    cluster stay; what stays empty keeps its center.
    """
    empty = (now.mass <= 0).nonzero()[:, 0].tolist()
    farthest = now.sqdist.argsort(descending=True, stable=True)
    labels, sqdist = now.labels.cpu(), now.sqdist.cpu()
    weight = None if weight is None else weight.cpu()
    size = torch.bincount(labels, minlength=len(now.mass))
    moves: list[tuple[int, int]] = []  # row, target
    for row in (row for part in farthest.split(1024) for row in part.tolist()):
        if len(moves) == len(empty) or sqdist[row] <= 0:
            break
        if (weight is None or weight[row] > 0) and size[labels[row]] >= 2:
            size[labels[row]] -= 1
            moves.append((row, empty[len(moves)]))
    rows = torch.tensor([row for row, _ in moves], dtype=torch.int64)
    for (row, target), vector in zip(moves, x.take(rows).double(), strict=True):
        donor, moved = int(labels[row]), 1.0 if weight is None else float(weight[row])
        now.sums[donor] -= moved * vector
        now.mass[donor] -= moved
        now.sums[target], now.mass[target] = moved * vector, moved


def _integer_cumsum(mass: Tensor) -> Tensor:
    """The cumulative sum in units of max(mass) n / 2^62, int64.

    A GPU adds floating-point numbers in another order from call to call; integers do not mind.
    """
    share = mass / mass.amax().clamp(min=1e-300)
    return (share * (2.0**62 / len(mass))).long().cumsum(0)


def _draw_rows(mass: Tensor, uniform: Tensor) -> Tensor:
    """A row for each uniform number, with probabilities proportional to mass (float64 [n])."""
    # On the CPU the sum of one dimension is serial.
    cumulative = mass.cumsum(0) if mass.device.type == "cpu" else _integer_cumsum(mass)
    position = (uniform * cumulative[-1]).to(cumulative.dtype)
    return torch.searchsorted(cumulative, position, right=True).clamp_(max=len(mass) - 1)


def _uniforms(
    counts: list[int], generator: torch.Generator, device: torch.device
) -> tuple[Tensor, ...]:
    """Uniform numbers for several draws, made on the CPU and moved to the device at once."""
    drawn = [torch.rand(c, generator=generator, dtype=torch.float64) for c in counts]
    return torch.cat(drawn).to(device).split(counts)


def random_rows(
    x: Blocks, weight: Tensor | None, n_clusters: int, generator: torch.Generator
) -> Tensor:
    """Distinct rows, each drawn in turn with probability proportional to its weight."""
    if weight is None:
        return torch.randperm(x.rows, generator=generator)[:n_clusters].to(x.device)
    mass, rows = weight.to(torch.float64, copy=True), []
    for uniform in _uniforms([1] * n_clusters, generator, x.device):
        rows.append(_draw_rows(mass, uniform))
        mass.index_fill_(0, rows[-1], 0.0)
    return torch.cat(rows)


def seeding_rows(
    x: Blocks, weight: Tensor | None, n_clusters: int, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """The rows that k-means++ chooses from, and their weights.

    It reads them once for each cluster, so of a matrix of more than a block they are drawn at
    random: as many as a block has, or 16 for each cluster.
    """
    limit = max(x.size, 16 * n_clusters)
    if x.rows <= limit:
        return joined([block for _, block in x]), weight
    able = None if weight is None else (weight > 0).nonzero()[:, 0].cpu()
    order = torch.randperm(x.rows if able is None else len(able), generator=generator)[:limit]
    rows = (order if able is None else able[order]).sort().values
    return x.take(rows), None if weight is None else weight[rows.to(weight.device)]


def plus_plus_rows(
    x: Tensor, weight: Tensor | None, n_clusters: int, generator: torch.Generator
) -> Tensor:
    """Greedy k-means++: of each step's candidates the one that leaves the least potential."""
    trials = 2 + int(math.log(n_clusters))
    sqdist = torch.full((len(x),), math.inf, dtype=center_dtype(x), device=x.device)
    mass = torch.ones_like(sqdist, dtype=torch.float64) if weight is None else weight.double()
    rows = []
    for uniform in _uniforms([1] + [trials] * (n_clusters - 1), generator, x.device):
        candidates = _draw_rows(mass, uniform)
        least, potential = kmeans_candidates(x, x[candidates], sqdist, weight=weight)
        best = potential.argmin(0, keepdim=True)
        rows.append(candidates[best])
        sqdist = least[best][0]
        mass = sqdist.double() if weight is None else sqdist.double() * weight
    return torch.cat(rows)
