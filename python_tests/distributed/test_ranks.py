"""fastif_ext.distributed on 1, 2 and 4 processes: the same results, and errors on all of them."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import fastif_ext as fi
from fastif_ext import passes

HERE = Path(__file__).parent
SIZES = (1, 2, 4)


def load(name: str) -> ModuleType:
    """A module beside this file."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


problem = load("problem")
worker = load("worker")
Found = dict[int, list[dict[str, Any]]]


def start(folder: Path, size: int, plan: str) -> list[dict[str, Any]]:
    """What each rank found; None from one that died."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(fi.__file__).parents[1]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "worker.py", folder, plan],
            env={**os.environ, **shared, "RANK": str(rank)},
            stderr=subprocess.DEVNULL if plan != "work" else None,
        )
        for rank in range(size)
    ]
    try:
        for process in processes:
            process.wait(timeout=300)
    finally:
        for process in processes:
            process.kill()
    paths = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(p, weights_only=False) if p.exists() else {} for p in paths]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return {size: start(tmp_path_factory.mktemp("ranks"), size, "work") for size in SIZES}


def same(a: Any, b: Any, rtol: float = 0.0) -> bool:
    """Whether all that is in two nests is equal, tensors bit for bit or to a relative error."""
    if isinstance(a, torch.Tensor):
        if rtol and a.is_floating_point():
            return bool((a - b).norm() <= rtol * b.norm())
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], rtol) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, rtol) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return abs(a - b) <= rtol * abs(b)
    return bool(a == b)


EXACT = [name for name in worker.SAME if name.startswith(("extract", "sample", "kmeans", "own"))]


class TestSame:
    @pytest.mark.parametrize("name", worker.SAME)
    def test_on_all_ranks(self, found: Found, name: str) -> None:
        for size in SIZES:
            first, *others = (rank[name] for rank in found[size])
            assert not (isinstance(first, dict) and "text" in first), first
            assert all(same(other, first) for other in others), size

    @pytest.mark.parametrize("name", EXACT)
    def test_bit_for_bit_on_any_number(self, found: Found, name: str) -> None:
        for size in (2, 4):
            assert same(found[size][0][name], found[1][0][name]), size

    @pytest.mark.parametrize("name", [name for name in worker.SAME if name not in EXACT])
    def test_to_rounding_on_any_number(self, found: Found, name: str) -> None:
        for size in (2, 4):
            one, several = (dict(found[s][0])[name] for s in (1, size))
            if isinstance(one, dict) and "facts" in one:  # of a report: rounding changes digits
                one, several = one["delta"], several["delta"]
            assert same(several, one, rtol=1e-8), size

    def test_rng_is_left_alone(self, found: Found) -> None:
        assert all(rank["rng"] is True for size in SIZES for rank in found[size])


class TestAsInOneProcess:
    """What one process gives without any of this."""

    @pytest.mark.parametrize("name", worker.folds())
    def test_samplers(self, found: Found, name: str) -> None:
        make: dict[str, Callable[..., Any]] = {
            "logit": lambda *a, **o: fi.LogitSampler.from_loader(*a, 6, **o),
            "logit by label": lambda *a, **o: fi.LogitSampler.from_loader(
                *a, 6, by_label=True, **o
            ),
            "curvature": lambda *a, **o: fi.CurvatureSampler.from_loader(*a, 30, **o),
            "systematic": lambda *a, **o: fi.CurvatureSampler.from_loader(
                *a, 30, method="systematic", **o
            ),
            "residual": lambda *a, **o: fi.ResidualSampler.from_loader(*a, 30, **o),
            "random": lambda *a, **o: fi.RandomSampler.from_loader(*a, 30, **o),
            "stratified": lambda *a, **o: fi.StratifiedSampler.from_loader(*a, 30, **o),
            "feature": lambda *a, **o: fi.FeatureSampler.from_loader(*a, 30, **o),
            "all": lambda *a, seed, **o: fi.AllRows.from_loader(*a, **o),
        }
        whole = make[name](problem.model(), problem.loader(), seed=3, progress=False)
        expected = [type(whole).__name__, whole.n, whole.indices, whole.weights]
        assert same(found[4][0][f"sample {name}"], expected)

    def test_tokens(self, found: Found) -> None:
        model, loader = problem.tokens()
        whole = fi.extract(model, loader, progress=False)
        n = len(whole.logits)
        drawn = fi.LogitSampler(whole.logits, 6, seed=3)
        expected = [n, whole.logits, whole.labels, n, drawn.indices, drawn.weights]
        assert same(found[4][0]["sample tokens, logit"], expected)

    @pytest.mark.parametrize(("name", "n"), [("extract", problem.N), ("extract one batch", 9)])
    def test_extract(self, found: Found, name: str, n: int) -> None:
        loader = problem.loader(n)
        whole = fi.extract(problem.model(), loader, layer="penultimate", progress=False)
        assert same(found[4][0][name], [n, *whole])

    def test_kmeans(self, found: Found) -> None:
        x = problem.points()
        one = fi.KMeans(6, init=x[:6]).fit(x)
        expected = [one.cluster_centers_, one.inertia_, one.n_iter_]
        assert same(found[4][0]["kmeans from"], expected, rtol=1e-6)
        assert same(found[4][0]["kmeans uneven"][0], found[1][0]["kmeans"][0])
        centers, labels, inertia, _ = found[2][0]["kmeans"]
        assert same(labels, fi.kmeans_assign(x, centers)[0])
        assert inertia < 1.1 * fi.KMeans(6, seed=0, n_init=5).fit(x).inertia_

    def test_kmeans_with_fewer_rows_than_centers(self, found: Found) -> None:
        centers, inertia = found[4][0]["kmeans few points"]
        assert inertia == 0
        assert same(centers, problem.points(4).unique(dim=0))

    @pytest.mark.parametrize("name", ["hessian", "hessian weighted", "gauss-newton"])
    def test_curvature(self, found: Found, name: str) -> None:
        part = problem.model(), cross_entropy, problem.data()
        weights = torch.linspace(0, 1, problem.N, dtype=torch.float64) / 50
        options = {"weights": weights if "weighted" in name else None}
        H: Any = (
            fi.GaussNewton(part[0], part[2])
            if name == "gauss-newton"
            else fi.Hessian(*part, **options)
        )
        b = fi.mean_gradient(*part, **options)
        several = torch.stack([b, b.flip(0), b.roll(3)])
        damping = 0.05 if name == "gauss-newton" else 1.5
        x = fi.exact(H, several, damping=damping).x
        got = found[4][0][name]
        assert got["rows"] == problem.N
        assert same(got["gradient"], b, 1e-12)
        assert same(got["product"], H @ several, 1e-12)
        assert same(got["cg"], x, 1e-8)
        assert same(got["lissa"], x[0], 1e-8)
        assert same(got["exact"], x[0], 1e-8)

    def test_own_operators_weigh_by_their_rows(self, found: Found) -> None:
        H = fi.Hessian(problem.model(), cross_entropy, problem.data())
        rows, product = found[4][0]["unequal"]
        assert rows == problem.N
        assert same(product, H @ torch.ones(H.dim, dtype=H.dtype), 1e-12)

    def test_few_rows(self, found: Found) -> None:
        G = fi.GaussNewton(problem.model(), problem.data(3))
        v = torch.ones(G.dim, dtype=G.dtype)
        assert same(found[4][0]["few rows"][0], G @ v, 1e-12)

    @pytest.mark.parametrize("curvature", ["gauss-newton", "linear-softmax"])
    def test_scores(self, found: Found, curvature: str) -> None:
        whole = fi.influence_scores(
            problem.model(),
            cross_entropy,
            problem.data(),
            problem.data(5),
            sampler=fi.RandomSampler(problem.N, 50, seed=1),
            curvature=curvature,
            **worker.SYSTEM,
        )
        assert whole.shape == (5, problem.N)
        assert same(found[4][0][f"scores {curvature}"], whole, 1e-7)

    @pytest.mark.parametrize("variant", ["fif", "gif", "sif"])
    def test_influence(self, found: Found, variant: str) -> None:
        one = worker.influence(variant, passes.HERE)
        assert same(found[4][0][f"influence {variant}"], one, 1e-6)

    @pytest.mark.parametrize("name", ["remove_rows", "correct_labels"])
    def test_edits(self, found: Found, name: str) -> None:
        one = worker.edit(name, passes.HERE)
        assert same(found[4][0][name]["delta"], one["delta"], 1e-8)


DISAGREE = {
    "other_seed": "sample: ranks disagree: seed is 0 on {others}, 7 on rank {last}",
    "other_sampler": "sample: ranks disagree: sampler is ResidualSampler on {others}, Curvature",
    "other_model": "extract: ranks disagree: model is ",
    "other_length": "curvature: ranks disagree: length of the data is 203 on {others}, 202 on",
    "other_vector": "H @ v: ranks disagree: v is ",
    "other_threads": "DistributedOperator: ranks disagree: threads is 1 on {others}, 2 on rank",
    "other_call": "ranks are in different calls: extract on {others}, kmeans on rank {last}",
    "other_batches": "extract: ranks disagree: ",
    "other_class": "remove_class: ranks disagree: class_index is 1 on {others}, 2 on rank {last}",
    "other_rows": "remove_rows: ranks disagree: rows is torch.int64 [5] with bits ",
    "other_damping": "influence_scores: ranks disagree: damping is 0.1 on {others}, 1.1 on rank",
    "other_clusters": "kmeans: ranks disagree: n_clusters is 3 on {others}, 4 on rank {last}",
}
FAIL = {
    "fails_in_extract": "extract failed on rank 0: OSError: row 0 cannot be read",
    "fails_in_product": "H @ v failed on rank 0: OSError: the disk is full",
    "fails_in_scores": "influence_scores failed on rank 0: OSError: row 0 cannot be read",
    "fails_in_removal": "remove_class failed on rank 0: OSError: no sampler today",
}


class TestTrouble:
    def test_all_are_looked_at(self) -> None:
        assert {*DISAGREE, *FAIL} == {*worker.TROUBLE}

    @pytest.mark.parametrize("size", [2, 4])
    @pytest.mark.parametrize("name", DISAGREE)
    def test_disagreement(self, found: Found, name: str, size: int) -> None:
        """All ranks raise, with the same words, and work together again afterwards."""
        others = "rank 0" if size == 2 else "ranks 0, 1, 2"
        said = {rank[name]["text"] for rank in found[size]}
        assert len(said) == 1
        assert said.pop().startswith(DISAGREE[name].format(others=others, last=size - 1))
        assert {rank[name]["type"] for rank in found[size]} == {"RankError"}
        assert max(rank[name]["seconds"] for rank in found[size]) < 30

    @pytest.mark.parametrize("size", [2, 4])
    @pytest.mark.parametrize("name", FAIL)
    def test_failure_of_one_reaches_all(self, found: Found, name: str, size: int) -> None:
        first, *others = (rank[name] for rank in found[size])
        assert first["type"] == "OSError"
        assert {rank["text"] for rank in others} == {FAIL[name]}


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    return lambda plan: start(tmp_path_factory.mktemp("lost"), 3, plan)


def test_tokens_without_labels(found: Found) -> None:
    """Before the pass nobody knows how many tokens there are: refused, on all ranks."""
    assert "the model gave 80 rows for the 16" in found[2][0]["tokens without labels"]["text"]
    for size in (2, 4):
        for rank in found[size]:
            assert "must hold labels [batch, T]" in rank["tokens without labels"]["text"]


class TestLostRank:
    def test_killed(self, lost: Callable[[str], Any]) -> None:
        """SIGKILL in the middle of a solve."""
        *others, victim = lost("killed")
        assert victim == {}
        for rank in others:
            assert rank["killed"]["type"] == "RankError"
            assert rank["killed"]["text"].startswith(
                "H @ v: rank 2 did not come within 3 s: dead, stuck or in other work"
            )
            assert 3 <= rank["killed"]["seconds"] < 20
            assert rank["again"]["text"].endswith("start all ranks again")
            assert rank["again"]["seconds"] < 1

    def test_killed_with_the_store(self, lost: Callable[[str], Any]) -> None:
        victim, *others = lost("killed first")
        assert victim == {}
        for rank in others:
            assert "the process that hosts the store" in rank["killed"]["text"]
            assert rank["killed"]["seconds"] < 20
            assert rank["again"]["seconds"] < 1

    def test_stuck(self, lost: Callable[[str], Any]) -> None:
        *others, sleeper = lost("stuck")
        assert sleeper["stuck"] == "woke up"
        for rank in others:
            assert rank["stuck"]["text"].startswith("curvature: rank 2 did not come within 2 s")
            assert 2 <= rank["stuck"]["seconds"] < 10


class TestShard:
    def test_parts_are_the_whole(self) -> None:
        for n in (0, 1, 5, 64, 100):
            for size in (1, 2, 3, 7):
                for multiple in (1, 32):
                    parts = [
                        fi.distributed.shard(n, r, size, multiple=multiple) for r in range(size)
                    ]
                    assert [row for part in parts for row in part] == list(range(n))
                    assert all(part.start % multiple == 0 for part in parts if part)
                    blocks = [-(-len(part) // multiple) for part in parts]
                    assert max(blocks) - min(blocks) <= 1

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="rank 2 of 2, n = 5, multiple = 1"):
            fi.distributed.shard(5, 2, 2)
        with pytest.raises(ValueError, match="multiple = 0"):
            fi.distributed.shard(5, 0, 2, multiple=0)


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group\(\) first"):
        fi.distributed.extract(problem.model(), problem.loader())


def test_bad_loaders() -> None:
    from fastif_ext.distributed.shards import loader_part

    data = problem.data()
    with pytest.raises(ValueError, match="shuffle=False"):
        loader_part(DataLoader(data, 8, shuffle=True), 0, 2)
    with pytest.raises(ValueError, match="at least one row"):
        loader_part(DataLoader(problem.data(0), 8), 0, 2)
