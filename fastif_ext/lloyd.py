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

from fastif_ext.ops import kmeans_assign, kmeans_candidates

# Without the wrapper's check of the labels, for which it waits where they lie on a GPU.
kmeans_update = torch.ops.fastif_ext.kmeans_update


class Run(NamedTuple):
    """One run of Lloyd's algorithm."""

    centers: Tensor
    labels: Tensor
    inertia: float
    iterations: int


def center_dtype(x: Tensor) -> torch.dtype:
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


def mean_variance(x: Tensor) -> float:
    """The mean over columns of the variance of x, in a fixed order of summation."""
    if x.shape[1] == 0:
        return 0.0
    sums, _ = kmeans_update(x, torch.zeros(len(x), dtype=torch.int64, device=x.device), 1)
    _, sqdist = kmeans_assign(x, sums / len(x))
    return total(sqdist) / (len(x) * x.shape[1])


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


def lloyd(x: Tensor, weight: Tensor | None, centers: Tensor, max_iter: int, movement: float) -> Run:
    """Lloyd's algorithm from the given centers; labels and inertia belong to the last centers."""
    labels, sqdist = kmeans_assign(x, centers)
    iterations = 0
    # Whether to take for granted that no cluster is empty: to look first would wait for the GPU.
    hopeful = x.is_cuda
    while iterations < max_iter:
        sums, mass = sums_and_mass(x, labels, weight, len(centers))
        filled = (mass > 0).all()
        if not hopeful and not filled:
            _relocate_empty(x, weight, labels, sqdist, sums, mass)
        new_centers = means(sums, mass, centers)
        new_labels, new_sqdist = kmeans_assign(x, new_centers)
        moved = _total((new_centers - centers).double().square().flatten())
        found, *settled = torch.stack(
            [filled, moved <= movement, (new_labels == labels).all()]
        ).tolist()
        if hopeful and not found:
            hopeful = False
            continue
        iterations += 1
        centers, labels, sqdist = new_centers, new_labels, new_sqdist
        if any(settled):
            break
    return Run(centers, labels, total(sqdist, weight), iterations)


def _relocate_empty(
    x: Tensor, weight: Tensor | None, labels: Tensor, sqdist: Tensor, sums: Tensor, mass: Tensor
) -> None:
    """Moves the rows farthest from their centers, one each, to the empty clusters.

    Changes sums and mass in place. Rows without weight, rows on their center, and the last row of a
    cluster stay; what stays empty keeps its center.
    """
    empty = (mass <= 0).nonzero()[:, 0].tolist()
    farthest = sqdist.argsort(descending=True, stable=True)
    labels, sqdist = labels.cpu(), sqdist.cpu()
    weight = None if weight is None else weight.cpu()
    size = torch.bincount(labels, minlength=len(mass))
    for row in (row for part in farthest.split(1024) for row in part.tolist()):
        if not empty or sqdist[row] <= 0:
            return
        donor = int(labels[row])
        moved = 1.0 if weight is None else float(weight[row])
        if moved <= 0 or size[donor] < 2:
            continue
        target, vector = empty.pop(0), moved * x[row].double()
        sums[donor] -= vector
        mass[donor] -= moved
        size[donor] -= 1
        sums[target], mass[target] = vector, moved


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
    x: Tensor, weight: Tensor | None, n_clusters: int, generator: torch.Generator
) -> Tensor:
    """Distinct rows, each drawn in turn with probability proportional to its weight."""
    if weight is None:
        return torch.randperm(len(x), generator=generator)[:n_clusters].to(x.device)
    mass, rows = weight.to(torch.float64, copy=True), []
    for uniform in _uniforms([1] * n_clusters, generator, x.device):
        rows.append(_draw_rows(mass, uniform))
        mass.index_fill_(0, rows[-1], 0.0)
    return torch.cat(rows)


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
