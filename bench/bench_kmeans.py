"""K-means: the assignment step, and a whole fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastif_ext as fi

CASES = [(5_000, 64, 10), (50_000, 512, 100), (200_000, 64, 256)]


def addmm_argmin(x: Tensor, c: Tensor) -> Tensor:
    return torch.addmm(c.square().sum(1), x, c.t(), alpha=-2).argmin(1)


def sklearn_e_step(x: Tensor, c: Tensor) -> Any:
    cluster = pytest.importorskip("sklearn.cluster._kmeans")
    from threadpoolctl import threadpool_limits

    with threadpool_limits(torch.get_num_threads()):
        return cluster._labels_inertia(
            x.numpy(), torch.ones(len(x)).numpy(), c.numpy(), n_threads=torch.get_num_threads()
        )


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "fastif_ext": lambda x, c: fi.kmeans_assign(x, c),
    "cdist + argmin": lambda x, c: torch.cdist(x, c).argmin(1),
    "addmm + argmin": addmm_argmin,
    "scikit-learn E-step": sklearn_e_step,
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("n", "d", "clusters"), CASES)
def test_assign(
    name: str, n: int, d: int, clusters: int, rows: Callable[[int], int], timed: Callable[..., None]
) -> None:
    n = rows(n)
    x, c = torch.randn(n, d), torch.randn(clusters, d)
    timed(f"kmeans_assign n={n} d={d} K={clusters}", lambda: IMPLEMENTATIONS[name](x, c))


@pytest.mark.parametrize("name", ["fastif_ext", "index_add_", "one-hot GEMM"])
@pytest.mark.parametrize(("n", "d", "clusters"), CASES)
def test_update(
    name: str, n: int, d: int, clusters: int, rows: Callable[[int], int], timed: Callable[..., None]
) -> None:
    n = rows(n)
    x, labels = torch.randn(n, d), torch.randint(clusters, (n,))
    call = {
        "fastif_ext": lambda: fi.kmeans_update(x, labels, clusters),
        "index_add_": lambda: torch.zeros(clusters, d).index_add_(0, labels, x),
        "one-hot GEMM": lambda: torch.nn.functional.one_hot(labels, clusters).float().t() @ x,
    }[name]
    timed(f"kmeans_update n={n} d={d} K={clusters}", call)


@pytest.mark.parametrize("name", ["fastif_ext", "scikit-learn"])
def test_fit(name: str, rows: Callable[[int], int], timed: Callable[..., None]) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    n, d, clusters = rows(20_000), 64, 10
    centers = 3 * torch.randn(clusters, d)
    x = centers[torch.arange(n) % clusters] + torch.randn(n, d)
    call = {
        "fastif_ext": lambda: fi.KMeans(clusters, seed=0).fit(x),
        "scikit-learn": lambda: cluster.KMeans(clusters, n_init=1, random_state=0).fit(x.numpy()),
    }[name]
    timed(f"KMeans.fit n={n} d={d} K={clusters}", call)
