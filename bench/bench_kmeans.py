"""K-means: the assignment step, the update, and a whole fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import floors
import pytest
import torch
from cases import cases, compiled, relative_error
from rounds import Call, Job
from torch import Tensor

import fastif_ext as fi

SIZES = {
    "cpu": [(500, 64, 10), (5_000, 64, 10), (50_000, 512, 100), (200_000, 64, 256)],
    "cuda": [(5_000, 64, 10), (60_000, 512, 100), (1_000_000, 768, 1000), (2_000_000, 128, 4096)],
}
FIT = {
    "cpu": [(2_000, 64, 10), (20_000, 64, 10), (60_000, 128, 100)],
    "cuda": [(20_000, 64, 10), (1_000_000, 128, 256)],
}


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


def faiss_search(x: Tensor, c: Tensor) -> Callable[[], Any]:
    """Its flat index, as its own k-means uses it; the index is made anew, as the centroids are."""

    def search() -> Any:
        faiss = pytest.importorskip("faiss")
        if x.is_cuda:
            pytest.skip("faiss-cpu has no GPU")
        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatL2(c.shape[1])
        index.add(c.numpy())
        return index.search(x.numpy(), 1)[1][:, 0]

    return search


def flash_assign(x: Tensor, c: Tensor) -> Any:
    flash = pytest.importorskip("flash_kmeans.assign_euclid_triton")
    if not x.is_cuda:
        pytest.skip("flash-kmeans needs a GPU")
    squares = x.float().square().sum(1)
    return flash.euclid_assign_triton(x[None], c[None], squares[None])


def labels_of(result: Any) -> Tensor:
    first = result[0] if isinstance(result, tuple) else result
    return torch.as_tensor(first).flatten().cpu().long()


ASSIGN = (
    "fastif_ext",
    "cdist + argmin",
    "addmm + argmin",
    "torch.compile",
    "scikit-learn E-step",
    "faiss",
    "flash-kmeans",
)
HALF = ("fastif_ext", "addmm + argmin", "torch.compile", "flash-kmeans")


def assign(n: int, d: int, K: int, device: str, dtype: torch.dtype = torch.float32) -> Job:
    x, c = (torch.randn(m, d, device=device).to(dtype) for m in (n, K))
    fast = compiled(addmm_argmin)
    calls: dict[str, Call] = {
        "fastif_ext": lambda: fi.kmeans_assign(x, c),
        "cdist + argmin": lambda: torch.cdist(x, c).argmin(1),
        "addmm + argmin": lambda: addmm_argmin(x, c),
        "torch.compile": lambda: fast(x, c),
        "scikit-learn E-step": lambda: sklearn_e_step(x, c),
        "faiss": faiss_search(x, c),
        "flash-kmeans": lambda: flash_assign(x, c),
    }
    few = min(n, 5000)
    want = torch.cdist(x[:few].cpu().double(), c.cpu().double()).argmin(1)

    def wrong(result: Any) -> float:
        """The share of rows whose centroid is not the nearest one."""
        return float((labels_of(result)[:few] != want).double().mean())

    half = dtype != torch.float32
    # Exact float32 labels come at the speed of TF32 where there is such a unit.
    unit = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "tf32")
    work = floors.kmeans_assign(n, d, K, item=x.element_size(), unit=unit)
    return Job({name: calls[name] for name in (HALF if half else ASSIGN)}, work, wrong)


def update(n: int, d: int, K: int, device: str) -> Job:
    x = torch.randn(n, d, device=device)
    labels = torch.randint(K, (n,), device=device)

    def one_hot() -> Tensor:
        if n * K > 1 << 30:
            pytest.skip("a one-hot matrix of this size does not fit")
        return torch.nn.functional.one_hot(labels, K).float().t() @ x

    want = torch.zeros(K, d, dtype=torch.float64, device=device).index_add_(0, labels, x.double())
    calls = {
        "fastif_ext": lambda: fi.kmeans_update(x, labels, K)[0],
        "index_add_": lambda: x.new_zeros(K, d).index_add_(0, labels, x),
        "one-hot GEMM": one_hot,
    }
    return Job(calls, floors.kmeans_update(n, d, K), lambda sums: relative_error(sums, want))


def fit(n: int, d: int, K: int, device: str) -> Job:
    centers = 3 * torch.randn(K, d)
    x = (centers[torch.arange(n) % K] + torch.randn(n, d)).to(device)

    def sklearn() -> float:
        if device == "cuda" and n > 100_000:
            pytest.skip("takes minutes")
        from threadpoolctl import threadpool_limits

        cluster = pytest.importorskip("sklearn.cluster")
        with threadpool_limits(torch.get_num_threads()):
            return cluster.KMeans(K, n_init=1, random_state=0).fit(x.cpu().numpy()).inertia_

    def flash() -> Any:
        module = pytest.importorskip("flash_kmeans")
        if device == "cpu":
            pytest.skip("flash-kmeans needs a GPU")
        labels = module.batch_kmeans_Euclid(x[None], K)[0][0]
        sums, counts = fi.kmeans_update(x, labels, K)
        return float((x - (sums / counts[:, None])[labels]).square().sum())

    # The data have n d of it around their true centres.
    calls = {
        "fastif_ext": lambda: fi.KMeans(K, seed=0).fit(x).inertia_,
        "scikit-learn": sklearn,
        "flash-kmeans": flash,
    }
    return Job(calls, error=lambda inertia: float(inertia) / (n * d) - 1)


@pytest.mark.parametrize("name", ASSIGN)
@pytest.mark.parametrize("case", cases(SIZES))
def test_assign(name, case, device, here, rows, compare) -> None:
    n, d, K = here(case)
    n = rows(n)
    compare(name, f"kmeans_assign n={n} d={d} K={K}", lambda: assign(n, d, K, device))


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", cases({"cpu": SIZES["cpu"][2:3], "cuda": SIZES["cuda"][1:]}))
def test_assign_half(name, dtype, case, device, here, rows, compare) -> None:
    n, d, K = here(case)
    n = rows(n)
    group = f"kmeans_assign {dtype} n={n} d={d} K={K}"
    compare(name, group, lambda: assign(n, d, K, device, getattr(torch, dtype)))


@pytest.mark.parametrize("name", ["fastif_ext", "index_add_", "one-hot GEMM"])
@pytest.mark.parametrize("case", cases(SIZES))
def test_update(name, case, device, here, rows, compare) -> None:
    n, d, K = here(case)
    n = rows(n)
    compare(name, f"kmeans_update n={n} d={d} K={K}", lambda: update(n, d, K, device))


@pytest.mark.parametrize("name", ["fastif_ext", "scikit-learn", "flash-kmeans"])
@pytest.mark.parametrize("case", cases(FIT))
def test_fit(name, case, device, here, rows, compare) -> None:
    n, d, K = here(case)
    n = rows(n)
    compare(name, f"KMeans.fit n={n} d={d} K={K}", lambda: fit(n, d, min(K, n), device))
