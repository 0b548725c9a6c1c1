"""K-means: the assignment step, the update, and a whole fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import floors
import pytest
import torch
from cases import cases, compiled
from torch import Tensor

import fastif_ext as fi

Timed = Callable[..., None]
SIZES = {
    "cpu": [(5_000, 64, 10), (50_000, 512, 100), (200_000, 64, 256)],
    "cuda": [(5_000, 64, 10), (60_000, 512, 100), (1_000_000, 768, 1000), (2_000_000, 128, 4096)],
}
FIT = {"cpu": [(20_000, 64, 10)], "cuda": [(20_000, 64, 10), (1_000_000, 128, 256)]}


def addmm_argmin(x: Tensor, c: Tensor) -> Tensor:
    return torch.addmm(c.square().sum(1), x, c.t(), alpha=-2).argmin(1)


def sklearn_e_step(x: Tensor, c: Tensor) -> Any:
    cluster = pytest.importorskip("sklearn.cluster._kmeans")
    from threadpoolctl import threadpool_limits

    if x.is_cuda:
        pytest.skip("scikit-learn has no GPU")
    with threadpool_limits(torch.get_num_threads()):
        return cluster._labels_inertia(
            x.numpy(), torch.ones(len(x)).numpy(), c.numpy(), n_threads=torch.get_num_threads()
        )


def flash_assign(x: Tensor, c: Tensor) -> Any:
    flash = pytest.importorskip("flash_kmeans.assign_euclid_triton")
    if not x.is_cuda:
        pytest.skip("flash-kmeans needs a GPU")
    squares = x.float().square().sum(1)
    return flash.euclid_assign_triton(x[None], c[None], squares[None])


ASSIGN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "fastif_ext": lambda x, c: fi.kmeans_assign(x, c),
    "cdist + argmin": lambda x, c: torch.cdist(x, c).argmin(1),
    "addmm + argmin": addmm_argmin,
    "torch.compile": addmm_argmin,
    "scikit-learn E-step": sklearn_e_step,
    "flash-kmeans": flash_assign,
}


@pytest.mark.parametrize("name", ASSIGN)
@pytest.mark.parametrize("case", cases(SIZES))
def test_assign(
    name: str, case: tuple, device: str, here: Callable, rows: Callable[[int], int], timed: Timed
) -> None:
    n, d, clusters = here(case)
    n = rows(n)
    x, c = torch.randn(n, d, device=device), torch.randn(clusters, d, device=device)
    call = compiled(addmm_argmin) if name == "torch.compile" else ASSIGN[name]
    # Exact float32 labels come at the speed of TF32 where there is such a unit.
    unit = "tf32" if device == "cuda" else "fp32"
    work = floors.kmeans_assign(n, d, clusters, unit=unit)
    timed(f"kmeans_assign n={n} d={d} K={clusters}", lambda: call(x, c), work)


@pytest.mark.parametrize("name", ["fastif_ext", "flash-kmeans", "addmm + argmin"])
@pytest.mark.parametrize("case", cases({"cuda": SIZES["cuda"][1:]}))
def test_assign_bf16(
    name: str, case: tuple, device: str, here: Callable, rows: Callable[[int], int], timed: Timed
) -> None:
    n, d, clusters = here(case)
    n = rows(n)
    x, c = (torch.randn(m, d, device=device, dtype=torch.bfloat16) for m in (n, clusters))
    work = floors.kmeans_assign(n, d, clusters, item=2, unit="bf16")
    timed(f"kmeans_assign bf16 n={n} d={d} K={clusters}", lambda: ASSIGN[name](x, c), work)


@pytest.mark.parametrize("name", ["fastif_ext", "index_add_", "one-hot GEMM"])
@pytest.mark.parametrize("case", cases(SIZES))
def test_update(
    name: str, case: tuple, device: str, here: Callable, rows: Callable[[int], int], timed: Timed
) -> None:
    n, d, clusters = here(case)
    n = rows(n)
    x = torch.randn(n, d, device=device)
    labels = torch.randint(clusters, (n,), device=device)
    if name == "one-hot GEMM" and n * clusters > 1 << 30:
        pytest.skip("a one-hot matrix of this size does not fit")
    call = {
        "fastif_ext": lambda: fi.kmeans_update(x, labels, clusters),
        "index_add_": lambda: x.new_zeros(clusters, d).index_add_(0, labels, x),
        "one-hot GEMM": lambda: torch.nn.functional.one_hot(labels, clusters).float().t() @ x,
    }[name]
    work = floors.kmeans_update(n, d, clusters)
    timed(f"kmeans_update n={n} d={d} K={clusters}", call, work)


@pytest.mark.parametrize("name", ["fastif_ext", "scikit-learn", "flash-kmeans"])
@pytest.mark.parametrize("case", cases(FIT))
def test_fit(
    name: str, case: tuple, device: str, here: Callable, rows: Callable[[int], int], timed: Timed
) -> None:
    n, d, clusters = here(case)
    n = rows(n)
    centers = 3 * torch.randn(clusters, d)
    x = (centers[torch.arange(n) % clusters] + torch.randn(n, d)).to(device)
    if name == "fastif_ext":
        call = lambda: fi.KMeans(clusters, seed=0).fit(x)  # noqa: E731
    elif name == "scikit-learn":
        if device == "cuda" and n > 100_000:
            pytest.skip("takes minutes")
        cluster, data = pytest.importorskip("sklearn.cluster"), x.cpu().numpy()
        call = lambda: cluster.KMeans(clusters, n_init=1, random_state=0).fit(data)  # noqa: E731
    else:
        flash = pytest.importorskip("flash_kmeans")
        if device == "cpu":
            pytest.skip("flash-kmeans needs a GPU")
        call = lambda: flash.batch_kmeans_Euclid(x[None], clusters)  # noqa: E731
    timed(f"KMeans.fit n={n} d={d} K={clusters}", call)
