"""k-means clustering: an estimator in the manner of scikit-learn, on the k-means operators."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fastif_ext.lloyd import (
    Run,
    center_dtype,
    lloyd,
    mean_variance,
    means,
    plus_plus_rows,
    random_rows,
    sums_and_mass,
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
    def fit(self, x: Tensor, sample_weight: Tensor | None = None) -> KMeans:
        """Cluster the rows of x.

        Args:
            x: [n, d] with n >= n_clusters, float32, float64, float16 or bfloat16, finite.
            sample_weight: [n], not negative; a row of weight w counts as w rows.

        Returns:
            self.

        Raises:
            TypeError, ValueError: x or sample_weight does not fit; the message names it.
        """
        weight = self._check_data("KMeans.fit", x, sample_weight, rows=self.n_clusters)
        generator = self._generator()
        movement = self.tol * mean_variance(x)
        best: Run | None = None
        for _ in range(1 if isinstance(self.init, Tensor) else self.n_init):
            run = lloyd(
                x, weight, self._seed_centers(x, weight, generator), self.max_iter, movement
            )
            if best is None or run.inertia < best.inertia:
                best = run
        assert best is not None
        self.cluster_centers_, self.labels_, self.inertia_, self.n_iter_ = best
        self._sums, self._mass = sums_and_mass(x, self.labels_, weight, self.n_clusters)
        found = int((self._mass > 0).sum())
        if found < self.n_clusters:
            warnings.warn(
                f"KMeans.fit: only {found} of n_clusters = {self.n_clusters} clusters have a row; "
                f"x has too few distinct rows",
                stacklevel=2,
            )
        return self

    @torch.no_grad()
    def partial_fit(self, x: Tensor, sample_weight: Tensor | None = None) -> KMeans:
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
        weight = self._check_data("KMeans.partial_fit", x, sample_weight, rows=rows)
        if fresh:
            centers = self._seed_centers(x, weight, self._generator())
            self._sums = torch.zeros_like(centers, dtype=torch.float64)
            self._mass = self._sums.new_zeros(self.n_clusters)
            self.n_iter_ = 0
        else:
            self._check_columns("KMeans.partial_fit", x)
            centers = self.cluster_centers_.to(x.device, center_dtype(x))
        assert self._sums is not None
        assert self._mass is not None
        self.labels_, sqdist = kmeans_assign(x, centers)
        self.inertia_ = total(sqdist, weight)
        sums, mass = sums_and_mass(x, self.labels_, weight, self.n_clusters)
        self._sums = self._sums.to(x.device) + sums
        self._mass = self._mass.to(x.device) + mass
        self.cluster_centers_ = means(self._sums, self._mass, centers)
        self.n_iter_ += 1
        return self

    def fit_predict(self, x: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """labels_ after fit(x, sample_weight)."""
        return self.fit(x, sample_weight).labels_

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The cluster of each row, int64 [n], as by kmeans_assign.

        Raises:
            RuntimeError: the model is not fitted.
            TypeError, ValueError: x does not fit, or has a row that is not finite.
        """
        self._check_fitted("KMeans.predict", x)
        labels, _ = kmeans_assign(x, self.cluster_centers_.to(x.device, center_dtype(x)))
        if (labels < 0).any():
            row = int((labels < 0).nonzero()[0])
            raise ValueError(f"KMeans.predict: row {row} of x has NaN or inf; remove such rows")
        return labels

    @torch.no_grad()
    def transform(self, x: Tensor) -> Tensor:
        """The Euclidean distance of each row to each center, [n, K], directly summed.

        Raises:
            RuntimeError: the model is not fitted.
            TypeError, ValueError: x does not fit.
        """
        self._check_fitted("KMeans.transform", x)
        dtype = center_dtype(x)
        return torch.cdist(
            x.to(dtype),
            self.cluster_centers_.to(x.device, dtype),
            compute_mode="donot_use_mm_for_euclid_dist",
        )

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(draw_seed("KMeans", self.seed, None))

    def _seed_centers(self, x: Tensor, weight: Tensor | None, generator: torch.Generator) -> Tensor:
        if isinstance(self.init, Tensor):
            return self.init.to(device=x.device, dtype=center_dtype(x), copy=True)
        if self.init == "random":
            rows = random_rows(x, weight, self.n_clusters, generator)
        else:
            rows = plus_plus_rows(x, weight, self.n_clusters, generator)
        return x[rows].to(center_dtype(x))

    def _check_data(
        self, op: str, x: Tensor, sample_weight: Tensor | None, *, rows: int
    ) -> Tensor | None:
        """Checks x and the weights; returns the weights in the dtype of the centers."""
        check_tensor(op, "x", x, dims=(2,))
        if x.shape[0] < rows:
            raise ValueError(
                f"{op}: x has {x.shape[0]} rows, fewer than n_clusters = {self.n_clusters}; "
                f"pass more rows or choose fewer clusters"
            )
        if isinstance(self.init, Tensor) and self.init.shape[1] != x.shape[1]:
            raise ValueError(
                f"{op}: x has {x.shape[1]} columns, init has shape {shape(self.init)}; "
                f"both must have the same number of columns"
            )
        if x.numel() and not all(bound.isfinite() for bound in torch.aminmax(x)):
            row = int((~x.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"{op}: row {row} of x has NaN or inf; remove such rows")
        if sample_weight is None:
            return None
        check_tensor(op, "sample_weight", sample_weight, dims=(1,), dtypes=FLOATING)
        if sample_weight.shape[0] != x.shape[0]:
            raise ValueError(
                f"{op}: sample_weight has length {sample_weight.shape[0]}, "
                f"x has {x.shape[0]} rows; pass one weight per row"
            )
        weight = sample_weight.to(x.device, center_dtype(x))
        if not (weight.isfinite() & (weight >= 0)).all():
            raise ValueError(f"{op}: sample_weight must be finite and not negative")
        if int((weight > 0).sum()) < rows:
            raise ValueError(
                f"{op}: fewer than n_clusters = {self.n_clusters} rows have a positive weight"
            )
        return weight

    def _check_columns(self, op: str, x: Tensor) -> None:
        columns = self.cluster_centers_.shape[1]
        if x.shape[1] != columns:
            raise ValueError(f"{op}: x has {x.shape[1]} columns, the model was fitted on {columns}")

    def _check_fitted(self, op: str, x: Tensor) -> None:
        if self._sums is None:
            raise RuntimeError(f"{op}: the model is not fitted; call fit or partial_fit first")
        check_tensor(op, "x", x, dims=(2,))
        self._check_columns(op, x)
