"""Seeding and Lloyd's algorithm, as functions: what the KMeans estimator is made of.

Every sum goes through the k-means operators or a serial cumulative sum, so that results are the
same bits for any number of threads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastif_ext.ops import kmeans_assign, kmeans_candidates, kmeans_update


class Run(NamedTuple):
    """One run of Lloyd's algorithm."""

    centers: Tensor
    labels: Tensor
    inertia: float
    iterations: int


def center_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the centers for x: float32, or float64 for float64 x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def total(values: Tensor, weight: Tensor | None = None) -> float:
    """The weighted sum of [n] values in float64, in an order that does not depend on threads."""
    if weight is not None:
        values = values.double() * weight
    sums, _ = kmeans_update(
        values.double()[:, None], torch.zeros_like(values, dtype=torch.int64), 1
    )
    return float(sums)


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
    while iterations < max_iter:
        iterations += 1
        sums, mass = sums_and_mass(x, labels, weight, len(centers))
        if not (mass > 0).all():
            _relocate_empty(x, weight, labels, sqdist, sums, mass)
        old_centers, old_labels = centers, labels
        centers = means(sums, mass, old_centers)
        labels, sqdist = kmeans_assign(x, centers)
        moved = total((centers - old_centers).double().square().flatten())
        if moved <= movement or torch.equal(labels, old_labels):
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
    labels, sqdist = labels.cpu(), sqdist.cpu()  # looked at one by one
    weight = None if weight is None else weight.cpu()
    size = torch.bincount(labels, minlength=len(mass))
    for row in sqdist.argsort(descending=True, stable=True).tolist():
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


def _draw_rows(mass: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows, independently, with probabilities proportional to mass (float64 [n])."""
    u = torch.rand(count, generator=generator, dtype=torch.float64).to(mass.device)
    cumulative = mass.cumsum(0) if mass.device.type == "cpu" else _whole_cumsum(mass)
    at = (u * cumulative[-1]).to(cumulative.dtype)
    return torch.searchsorted(cumulative, at, right=True).clamp_(max=len(mass) - 1)


def _whole_cumsum(mass: Tensor) -> Tensor:
    """The cumulative sum of mass in units of 2^-62 n max(mass), int64.

    A GPU sums in no fixed order, which makes no difference to integers. (On the CPU the sum of
    floating-point numbers along one dimension is serial.)
    """
    share = mass / mass.amax().clamp(min=1e-300)
    return (share * (2.0**62 / len(mass))).long().cumsum(0)


def random_rows(
    x: Tensor, weight: Tensor | None, n_clusters: int, generator: torch.Generator
) -> Tensor:
    """Distinct rows, each drawn in turn with probability proportional to its weight."""
    if weight is None:
        return torch.randperm(len(x), generator=generator)[:n_clusters].to(x.device)
    mass, rows = weight.double(), []
    for _ in range(n_clusters):
        rows.append(_draw_rows(mass, 1, generator))
        mass[rows[-1]] = 0
    return torch.cat(rows)


def plus_plus_rows(
    x: Tensor, weight: Tensor | None, n_clusters: int, generator: torch.Generator
) -> Tensor:
    """Greedy k-means++: of each step's candidates the one that leaves the least potential."""
    trials = 2 + int(math.log(n_clusters))
    sqdist = torch.full((len(x),), math.inf, dtype=center_dtype(x), device=x.device)
    mass = torch.ones_like(sqdist, dtype=torch.float64) if weight is None else weight.double()
    rows = []
    for step in range(n_clusters):
        candidates = _draw_rows(mass, trials if step else 1, generator)
        least, potential = kmeans_candidates(x, x[candidates], sqdist, weight=weight)
        best = potential.argmin().view(1)  # stays on the device: no step waits for it
        rows.append(candidates.index_select(0, best))
        sqdist = least.index_select(0, best)[0]
        mass = sqdist.double() if weight is None else sqdist.double() * weight
    return torch.cat(rows)
