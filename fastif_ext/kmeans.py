"""k-means clustering: an estimator in the manner of scikit-learn, on the k-means operators."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fastif_ext.blocks import Blocks, Matrix
from fastif_ext.lloyd import (
    Run,
    center_dtype,
    join_nearest,
    lloyd,
    mean_variance,
    means,
    plus_plus_rows,
    random_rows,
    seeding_rows,
    total,
)
from fastif_ext.ops import kmeans_assign
from fastif_ext.ops._check import FLOATING, check_count, check_tensor, draw_seed, shape


class KMeans:
    """k-means clustering by Lloyd's algorithm, seeded by greedy k-means++.

    The result is a function of the data and the seed: it does not depend on the number of threads,
    bit for bit. A GPU makes the same labels and centers as the CPU from the same first centers, bit
    for bit where there is no sample_weight, and draws the same first centers for init="random".
    Distances agree to rounding, and so do the inertia, the comparison with tol, and the
    probabilities of "k-means++". The sum of weight * squared distance (the inertia) does not
    increase from one iteration to the next. Sources: Lloyd 1982; Arthur & Vassilvitskii 2007, with
    the greedy choice among 2 + log(n_clusters) candidates of their section 6.

    Args:
        n_clusters: K, at least 1.
        init: "k-means++", "random" (distinct rows, by weight), or the first centers, [K, d].
        n_init: runs from different seedings, of which the one of least inertia is kept.
        max_iter: at most this many updates of the centers in a run.
        tol: a run stops when no label changes, or when the squared movement of all centers together
            is at most tol times the mean variance of the columns of x.
        seed: of the seeding; None draws one from torch's default generator, which otherwise is
            left alone.

    Attributes:
        cluster_centers_: [K, d], float32, or float64 for float64 x.
        labels_: the cluster of each row that was fitted, int64 [n].
        inertia_: the weighted sum of squared distances of those rows to their centers.
        n_iter_: updates of the centers in the run that was kept, or chunks seen by partial_fit.

    Example:
        >>> import torch, fastif_ext as fi
        >>> x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> model = fi.KMeans(2, seed=0).fit(x)
        >>> model.cluster_centers_.sort(0).values, model.inertia_
        (tensor([[ 0.5000],
                [10.5000]]), 1.0)
    """

    cluster_centers_: Tensor
    labels_: Tensor
    inertia_: float
    n_iter_: int

    def __init__(
        self,
        n_clusters: int,
        *,
        init: str | Tensor = "k-means++",
        n_init: int = 1,
        max_iter: int = 100,
        tol: float = 1e-4,
        seed: int | None = None,
    ) -> None:
        check_count("KMeans", "n_clusters", n_clusters, low=1)
        check_count("KMeans", "n_init", n_init, low=1)
        check_count("KMeans", "max_iter", max_iter, low=1)
        if not tol >= 0:
            raise ValueError(f"KMeans: tol must be at least 0, got {tol}")
        if isinstance(init, Tensor):
            check_tensor("KMeans", "init", init, dims=(2,))
            if init.shape[0] != n_clusters:
                raise ValueError(
                    f"KMeans: init has shape {shape(init)}; "
                    f"it must have n_clusters = {n_clusters} rows"
                )
            if not init.isfinite().all():
                raise ValueError("KMeans: init holds NaN or infinite values")
        elif init not in ("k-means++", "random"):
            raise ValueError(
                f"KMeans: init must be 'k-means++', 'random' or a tensor of centers, got {init!r}"
            )
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.seed = seed
        self._sums: Tensor | None = None  # of all weighted rows seen, float64 [K, d]
        self._mass: Tensor | None = None  # of their weights, float64 [K]

    @torch.no_grad()
    def fit(self, x: Matrix, sample_weight: Tensor | None = None) -> KMeans:
        """Cluster the rows of x, which may be larger than memory.

        Chunks, an array mapped from a file and a tensor give the same bits. Chunks are read four
        times, and once per iteration; what is in memory is a block of 2^26 numbers (256 MB of
        float32) and for each row its label and distance, 12 bytes, twice.

        Args:
            x: [n, d] with n >= n_clusters, float32, float64, float16 or bfloat16, finite: a tensor,
                a numpy array (np.memmap too), or an iterable that gives the same chunks [any, d]
                every time, as a list or a DataLoader that does not shuffle.
            sample_weight: [n], not negative; a row of weight w counts as w rows.

        Returns:
            self.

        Raises:
            TypeError, ValueError: x or sample_weight does not fit; the message names it.
        """
        blocks = Blocks("KMeans.fit", x)
        weight = self._check_data("KMeans.fit", blocks, sample_weight, rows=self.n_clusters)
        generator = self._generator()
        movement = self.tol * mean_variance(blocks)
        best: Run | None = None
        for _ in range(1 if isinstance(self.init, Tensor) else self.n_init):
            centers = self._seed_centers(blocks, weight, generator)
            run = lloyd(blocks, weight, centers, self.max_iter, movement)
            if best is None or run.inertia < best.inertia:
                best = run
        assert best is not None
        self.cluster_centers_, self.labels_, self.inertia_, self.n_iter_ = best[:4]
        self._sums, self._mass = best.sums, best.mass
        found = int((self._mass > 0).sum())
        if found < self.n_clusters:
            warnings.warn(
                f"KMeans.fit: only {found} of n_clusters = {self.n_clusters} clusters have a row; "
                f"x has too few distinct rows",
                stacklevel=2,
            )
        return self

    @torch.no_grad()
    def partial_fit(self, x: Matrix, sample_weight: Tensor | None = None) -> KMeans:
        """Take in one more chunk of rows, of data that is too large to hold or still arriving.

        Each row joins the cluster nearest at the time; each center is the mean of all rows that
        joined it so far (after fit: from that fit on). The first chunk also seeds the centers. The
        attributes labels_ and inertia_ are those of the chunk.

        Args:
            x: [n, d], n >= n_clusters in the first chunk unless init is a tensor.
            sample_weight: [n], not negative.

        Returns:
            self.

        Raises:
            TypeError, ValueError: x or sample_weight does not fit; the message names it.
        """
        fresh = self._sums is None
        rows = self.n_clusters if fresh and not isinstance(self.init, Tensor) else 0
        blocks = Blocks("KMeans.partial_fit", x)
        weight = self._check_data("KMeans.partial_fit", blocks, sample_weight, rows=rows)
        if fresh:
            centers = self._seed_centers(blocks, weight, self._generator())
            self._sums = torch.zeros_like(centers, dtype=torch.float64)
            self._mass = self._sums.new_zeros(self.n_clusters)
            self.n_iter_ = 0
        else:
            self._check_columns("KMeans.partial_fit", blocks.columns)
            centers = self.cluster_centers_.to(blocks.device, center_dtype(blocks))
        assert self._sums is not None
        assert self._mass is not None
        self.labels_, sqdist, sums, mass = join_nearest(blocks, weight, centers)
        self.inertia_ = total(sqdist, weight)
        self._sums = self._sums.to(blocks.device) + sums
        self._mass = self._mass.to(blocks.device) + mass
        self.cluster_centers_ = means(self._sums, self._mass, centers)
        self.n_iter_ += 1
        return self

    def fit_predict(self, x: Matrix, sample_weight: Tensor | None = None) -> Tensor:
        """labels_ after fit(x, sample_weight)."""
        return self.fit(x, sample_weight).labels_

    @torch.no_grad()
    def predict(self, x: Matrix) -> Tensor:
        """The cluster of each row, int64 [n], as by kmeans_assign.

        Args:
            x: as for fit.

        Raises:
            RuntimeError: the model is not fitted.
            TypeError, ValueError: x does not fit, or has a row that is not finite.
        """
        self._check_fitted("KMeans.predict")
        blocks = Blocks("KMeans.predict", x)
        self._check_columns("KMeans.predict", blocks.columns)
        centers = self.cluster_centers_.to(blocks.device, center_dtype(blocks))
        return torch.cat([kmeans_assign(block, centers)[0] for _, block in blocks])

    @torch.no_grad()
    def transform(self, x: Tensor) -> Tensor:
        """The Euclidean distance of each row to each center, [n, K], directly summed.

        Raises:
            RuntimeError: the model is not fitted.
            TypeError, ValueError: x does not fit.
        """
        self._check_fitted("KMeans.transform")
        check_tensor("KMeans.transform", "x", x, dims=(2,))
        self._check_columns("KMeans.transform", x.shape[1])
        dtype = center_dtype(x)
        return torch.cdist(
            x.to(dtype),
            self.cluster_centers_.to(x.device, dtype),
            compute_mode="donot_use_mm_for_euclid_dist",
        )

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(draw_seed("KMeans", self.seed, None))

    def _seed_centers(self, x: Blocks, weight: Tensor | None, generator: torch.Generator) -> Tensor:
        if isinstance(self.init, Tensor):
            return self.init.to(device=x.device, dtype=center_dtype(x), copy=True)
        if self.init == "random":
            centers = x.take(random_rows(x, weight, self.n_clusters, generator))
        else:
            rows, mass = seeding_rows(x, weight, self.n_clusters, generator)
            centers = rows[plus_plus_rows(rows, mass, self.n_clusters, generator)]
        return centers.to(center_dtype(x))

    def _check_data(
        self, op: str, x: Blocks, sample_weight: Tensor | None, *, rows: int
    ) -> Tensor | None:
        """Checks that x and the weights fit; returns the weights in the dtype of the centers."""
        if x.rows < rows:
            raise ValueError(
                f"{op}: x has {x.rows} rows, fewer than n_clusters = {self.n_clusters}; "
                f"pass more rows or choose fewer clusters"
            )
        if isinstance(self.init, Tensor) and self.init.shape[1] != x.columns:
            raise ValueError(
                f"{op}: x has {x.columns} columns, init has shape {shape(self.init)}; "
                f"both must have the same number of columns"
            )
        if sample_weight is None:
            return None
        check_tensor(op, "sample_weight", sample_weight, dims=(1,), dtypes=FLOATING)
        if sample_weight.shape[0] != x.rows:
            raise ValueError(
                f"{op}: sample_weight has length {sample_weight.shape[0]}, "
                f"x has {x.rows} rows; pass one weight per row"
            )
        weight = sample_weight.to(x.device, center_dtype(x))
        if not (weight.isfinite() & (weight >= 0)).all():
            raise ValueError(f"{op}: sample_weight must be finite and not negative")
        if int((weight > 0).sum()) < rows:
            raise ValueError(
                f"{op}: fewer than n_clusters = {self.n_clusters} rows have a positive weight"
            )
        return weight

    def _check_columns(self, op: str, columns: int) -> None:
        fitted = self.cluster_centers_.shape[1]
        if columns != fitted:
            raise ValueError(f"{op}: x has {columns} columns, the model was fitted on {fitted}")

    def _check_fitted(self, op: str) -> None:
        if self._sums is None:
            raise RuntimeError(f"{op}: the model is not fitted; call fit or partial_fit first")
