"""Operators for k-means: assignment, update, and the rows that represent a cluster."""

from __future__ import annotations

import torch
from torch import Tensor

from fastif_ext.ops._check import (
    FLOATING,
    can_read,
    check_count,
    check_no_grad,
    check_same_device,
    check_tensor,
    draw_seed,
    shape,
)

PRECISIONS = ("auto", "fp32", "tf32")


def _sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of distances and sums for x: float32, or float64 for float64 x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_assign(op: str, x: Tensor, centroids: Tensor) -> None:
    check_tensor(op, "x", x, dims=(2,))
    check_tensor(op, "centroids", centroids, dims=(2,))
    if x.shape[1] != centroids.shape[1]:
        raise ValueError(
            f"{op}: x has shape {shape(x)}, centroids {shape(centroids)}; "
            f"both must have the same number of columns"
        )
    if centroids.shape[0] < 1:
        raise ValueError(f"{op}: centroids has no row; pass at least one centroid")
    if centroids.dtype not in (x.dtype, _sum_dtype(x)):
        raise TypeError(
            f"{op}: centroids has dtype {centroids.dtype}, x has {x.dtype}; "
            f"convert it with centroids.to({_sum_dtype(x)})"
        )
    check_same_device(op, x=x, centroids=centroids)
    check_no_grad(op, x=x, centroids=centroids)


def kmeans_assign(
    x: Tensor, centroids: Tensor, *, precision: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The nearest centroid of every row, and the squared Euclidean distance to it.

    Labels are exact: the centroid at the least distance as computed in float64 from the given
    values, the lowest index among equals. The work is done on centred data in x's precision
    (float32 for half types) or, on a GPU's tensor cores, in TF32 (float16 for half types), and
    rows whose two best centroids are too close for that to be certain are settled in float64.
    Nothing of size n x K is stored; threads, chunks of rows and the device change no label.

    Args:
        x: rows, [n, d], float32, float64, float16 or bfloat16.
        centroids: [K, d] with K >= 1, x's dtype, or float32 with a half x. A centroid with NaN or
            inf is never chosen.
        precision: "auto" and "fp32" compute as stated above; torch's own TF32 switch does not
            matter. "tf32" is the same on the CPU; on a GPU it takes the label that the tensor cores
            find best, which saves a few percent of the time. Distances are those to the label's
            centroid, summed in float32, in any case.

    Returns:
        labels, int64 [n], and sqdist, float32 [n] (float64 for float64 x): sum((x - c)^2), summed
        directly. A row with NaN or inf has label -1 and distance NaN.

    Raises:
        TypeError, ValueError: a shape, dtype or value that does not fit; the message names it.
        RuntimeError: an input requires grad while grad mode is on.

    Example:
        >>> import torch, fastif_ext as fi
        >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [9.0, 9.0]])
        >>> fi.kmeans_assign(x, torch.tensor([[0.0, 0.0], [9.0, 8.0]]))
        (tensor([0, 0, 1]), tensor([ 0., 25.,  1.]))
    """
    op = "kmeans_assign"
    _check_assign(op, x, centroids)
    if precision not in PRECISIONS:
        raise ValueError(f"{op}: precision must be one of {PRECISIONS}, got {precision!r}")
    labels, sqdist = torch.ops.fastif_ext.kmeans_assign(x, centroids, precision)
    return labels, sqdist


def kmeans_update(
    x: Tensor, labels: Tensor, n_clusters: int, *, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sum of the rows of each cluster, and their number, in a fixed order of summation.

    Args:
        x: rows, [n, d], float32, float64, float16 or bfloat16.
        labels: the cluster of each row, int64 [n]; rows with label -1 are ignored.
        n_clusters: K.
        weight: a factor for each row in the sums, floating [n]; counts do not know of it.

    Returns:
        sums, float32 [K, d] (float64 for float64 x), and counts, int64 [K]. Both are 0 for an empty
        cluster. New centroids are sums / counts. Threads change no bit. Without weight a CPU and a
        GPU give the same bits; with it the same to rounding.

    Raises:
        TypeError, ValueError: a shape or dtype that does not fit; the message names it.
        RuntimeError: a label outside [-1, K), or an input that requires grad in grad mode. On a
            GPU, inside torch.compile or while a CUDA graph is captured, such a label makes all
            counts -1 and all sums NaN instead; otherwise this check waits for the GPU.

    Example:
        >>> import torch, fastif_ext as fi
        >>> x = torch.tensor([[1.0], [2.0], [5.0]])
        >>> fi.kmeans_update(x, torch.tensor([0, 0, 1]), 3)
        (tensor([[3.],
                [5.],
                [0.]]), tensor([2, 1, 0]))
    """
    op = "kmeans_update"
    check_tensor(op, "x", x, dims=(2,))
    check_tensor(op, "labels", labels, dims=(1,), dtypes=(torch.int64,))
    check_count(op, "n_clusters", n_clusters, low=0)
    if labels.shape[0] != x.shape[0]:
        raise ValueError(
            f"{op}: labels has length {labels.shape[0]}, x has {x.shape[0]} rows; "
            f"pass one label per row"
        )
    if weight is not None:
        check_tensor(op, "weight", weight, dims=(1,), dtypes=FLOATING)
        if weight.shape[0] != x.shape[0]:
            raise ValueError(
                f"{op}: weight has length {weight.shape[0]}, x has {x.shape[0]} rows; "
                f"pass one weight per row"
            )
    check_same_device(op, x=x, labels=labels, weight=weight)
    check_no_grad(op, x=x, weight=weight)
    if weight is not None:
        weight = weight.to(_sum_dtype(x))
    sums, counts = torch.ops.fastif_ext.kmeans_update(x, labels, n_clusters, weight)
    if x.is_cuda and can_read(x):
        _refuse_bad_labels(op, labels, counts)
    return sums, counts


def _refuse_bad_labels(op: str, labels: Tensor, counts: Tensor) -> None:
    """Raises what the operator does on the CPU, where a GPU has made the counts -1."""
    n_clusters = len(counts)
    if (counts[:1] < 0 if n_clusters else labels != -1).any():
        row = int(((labels < -1) | (labels >= n_clusters)).nonzero()[0])
        raise RuntimeError(
            f"fastif_ext::{op}: labels[{row}] = {int(labels[row])} is outside [-1, {n_clusters}); "
            f"use -1 for rows to ignore"
        )


def kmeans_nearest(x: Tensor, centroids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows nearest to each centroid, among the rows of its own cluster.

    Args:
        x: rows, [n, d], float32, float64, float16 or bfloat16.
        centroids: [K, d] with K >= 1, x's dtype, or float32 with a half x.
        k: rows per cluster, at least 0.

    Returns:
        index, int64 [K, k], and sqdist, float32 [K, k] (float64 for float64 x): row numbers and
        squared distances, ascending, ties to the lower row. A cluster of fewer than k rows is
        padded with -1 and inf. Clusters and distances are those of kmeans_assign.

    Raises:
        TypeError, ValueError: a shape, dtype or value that does not fit; the message names it.
        RuntimeError: an input requires grad while grad mode is on.

    Example:
        >>> import torch, fastif_ext as fi
        >>> x = torch.tensor([[3.0], [1.0], [9.0]])
        >>> fi.kmeans_nearest(x, torch.tensor([[0.0], [10.0]]), 2)
        (tensor([[ 1,  0],
                [ 2, -1]]), tensor([[1., 9.],
                [1., inf]]))
    """
    op = "kmeans_nearest"
    _check_assign(op, x, centroids)
    check_count(op, "k", k, low=0)
    index, sqdist = torch.ops.fastif_ext.kmeans_nearest(x, centroids, k)
    return index, sqdist


def kmeans_weighted(
    x: Tensor,
    centroids: Tensor,
    k: int,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw k rows of each cluster without replacement, with probability proportional to 1/distance.

    Row i has rank E_i d_i, with d_i its distance to the centroid and E_i a standard exponential
    that depends on (seed, i) alone; the k smallest ranks of a cluster are drawn, in that order: the
    law of drawing one after the other (Efraimidis & Spirakis 2006, "Weighted random sampling with a
    reservoir"). Rows at distance 0 come first, lower rows before higher ones.

    Args:
        x: rows, [n, d], float32, float64, float16 or bfloat16.
        centroids: [K, d] with K >= 1, x's dtype, or float32 with a half x.
        k: rows per cluster, at least 0.
        seed: the same seed draws the same rows, on a CPU and on a GPU (up to ranks that are equal
            to the rounding of kmeans_assign's distances); inside torch.compile it must be given.
        generator: draws the seed where none is given; default: torch's global generator.

    Returns:
        index, int64 [K, k]; a cluster of fewer than k rows is padded with -1.

    Raises:
        TypeError, ValueError: a shape, dtype or value that does not fit; the message names it.
        RuntimeError: an input requires grad while grad mode is on.

    Example:
        >>> import torch, fastif_ext as fi
        >>> x = torch.tensor([[0.0], [1.0], [10.0]])
        >>> fi.kmeans_weighted(x, torch.tensor([[0.0], [10.0]]), 1, seed=0)
        tensor([[0],
                [2]])
    """
    op = "kmeans_weighted"
    _check_assign(op, x, centroids)
    check_count(op, "k", k, low=0)
    seed = draw_seed(op, seed, generator)
    index: Tensor = torch.ops.fastif_ext.kmeans_weighted(x, centroids, k, seed)
    return index


def kmeans_candidates(
    x: Tensor, candidates: Tensor, sqdist: Tensor, *, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A step of greedy k-means++: what each candidate, as one more centroid, would achieve.

    Args:
        x: rows, [n, d], float32, float64, float16 or bfloat16.
        candidates: [L, d], x's dtype, or float32 with a half x.
        sqdist: squared distance of each row to its nearest centroid so far (inf if there is none),
            [n], float32, or float64 for float64 x.
        weight: a factor for each row in the potential, [n], sqdist's dtype.

    Returns:
        least, [L, n]: min(sqdist, squared distance to the candidate), and potential, float64 [L]:
        its (weighted) sum over the rows. Threads change no bit.

    Raises:
        TypeError, ValueError: a shape or dtype that does not fit; the message names it.
        RuntimeError: an input requires grad while grad mode is on.

    Example:
        >>> import torch
        >>> from fastif_ext.ops import kmeans_candidates
        >>> x = torch.tensor([[0.0], [1.0], [5.0]])
        >>> kmeans_candidates(x, x[1:], torch.tensor([0.0, 1.0, 25.0]))
        (tensor([[ 0.,  0., 16.],
                [ 0.,  1.,  0.]]), tensor([16.,  1.], dtype=torch.float64))
    """
    op = "kmeans_candidates"
    check_tensor(op, "x", x, dims=(2,))
    check_tensor(op, "candidates", candidates, dims=(2,), dtypes=(x.dtype, _sum_dtype(x)))
    if x.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"{op}: x has shape {shape(x)}, candidates {shape(candidates)}; "
            f"both must have the same number of columns"
        )
    for name, t in (("sqdist", sqdist), ("weight", weight)):
        if t is None:
            continue
        check_tensor(op, name, t, dims=(1,), dtypes=(_sum_dtype(x),))
        if t.shape[0] != x.shape[0]:
            raise ValueError(f"{op}: {name} has length {t.shape[0]}, x has {x.shape[0]} rows")
    check_same_device(op, x=x, candidates=candidates, sqdist=sqdist, weight=weight)
    check_no_grad(op, x=x, candidates=candidates, sqdist=sqdist, weight=weight)
    least, potential = torch.ops.fastif_ext.kmeans_candidates(x, candidates, sqdist, weight)
    return least, potential


@torch.library.register_fake("fastif_ext::kmeans_assign")
def _(x: Tensor, centroids: Tensor, precision: str = "auto") -> tuple[Tensor, Tensor]:
    n = x.shape[0]
    return x.new_empty(n, dtype=torch.int64), x.new_empty(n, dtype=_sum_dtype(x))


kmeans_update_unchecked = torch.ops.fastif_ext.kmeans_update
"""kmeans_update without its look at the labels, which waits for them where they lie on a GPU."""


@torch.library.register_fake("fastif_ext::kmeans_update")
def _(
    x: Tensor, labels: Tensor, n_clusters: int, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    sums = x.new_empty((n_clusters, x.shape[1]), dtype=_sum_dtype(x))
    return sums, x.new_empty(n_clusters, dtype=torch.int64)


@torch.library.register_fake("fastif_ext::kmeans_nearest")
def _(x: Tensor, centroids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    size = (centroids.shape[0], k)
    return x.new_empty(size, dtype=torch.int64), x.new_empty(size, dtype=_sum_dtype(x))


@torch.library.register_fake("fastif_ext::kmeans_weighted")
def _(x: Tensor, centroids: Tensor, k: int, seed: int) -> Tensor:
    return x.new_empty((centroids.shape[0], k), dtype=torch.int64)


@torch.library.register_fake("fastif_ext::kmeans_candidates")
def _(
    x: Tensor, candidates: Tensor, sqdist: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    L = candidates.shape[0]
    least = x.new_empty((L, x.shape[0]), dtype=_sum_dtype(x))
    return least, x.new_empty(L, dtype=torch.float64)
