"""k-means over chunks and mapped files: the bits of one tensor in memory, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastif_ext as fi
from fastif_ext import blocks
from fastif_ext.blocks import Blocks

N, D, K = 500, 6, 5
X = (
    torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    + 3 * (torch.arange(N) % K)[:, None]
)
WEIGHT = torch.rand(N, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Blocks of 64 rows, of which the data has eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", 64 * D)
        yield


class Chunks:
    """The rows between cuts, counted as they are read, with the largest piece of them."""

    def __init__(self, x: Tensor, cuts: list[int]) -> None:
        self.x, self.edges = x, [0, *sorted(cuts), len(x)]
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        for i in range(len(self.edges) - 1):
            yield self.x[self.edges[i] : self.edges[i + 1]].clone()


def assert_same(a: fi.KMeans, b: fi.KMeans) -> None:
    assert torch.equal(a.cluster_centers_, b.cluster_centers_)
    assert torch.equal(a.labels_, b.labels_)
    assert (a.inertia_, a.n_iter_) == (b.inertia_, b.n_iter_)


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, N), max_size=12),
    init=st.sampled_from(["k-means++", "random", "rows"]),
    weighted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 3),
)
def test_any_chunks_give_the_bits_of_the_whole(
    cuts: list[int], init: str, weighted: bool, dtype: torch.dtype, seed: int
) -> None:
    x, weight = X.to(dtype), WEIGHT if weighted else None
    make: Any = lambda: fi.KMeans(K, init=x[:K] if init == "rows" else init, seed=seed)  # noqa: E731
    whole = make().fit(x, weight)
    chunked = make().fit(Chunks(x, cuts), weight)
    assert_same(chunked, whole)
    assert torch.equal(chunked.predict(Chunks(x, cuts)), whole.predict(x))
    assert torch.equal(whole.predict(x), whole.labels_)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_against_one_block(weight: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks round sums of float32 in other places: the same clusters, centers to rounding."""
    small = fi.KMeans(K, init=X[:K]).fit(X, weight)
    monkeypatch.setattr(blocks, "BLOCK", 2**26)
    large = fi.KMeans(K, init=X[:K]).fit(X, weight)
    assert torch.equal(small.labels_, large.labels_)
    torch.testing.assert_close(small.cluster_centers_, large.cluster_centers_, rtol=1e-6, atol=1e-6)


def test_an_empty_cluster_is_filled_from_chunks_too() -> None:
    far = torch.full((K, D), 50.0)
    far[0] = 0
    whole = fi.KMeans(K, init=far).fit(X)
    assert len(whole.labels_.unique()) == K
    assert_same(fi.KMeans(K, init=far).fit(Chunks(X, [99, 300])), whole)


def test_seeding_reads_a_sample_of_many_rows() -> None:
    """Sixteen rows for each cluster: 80 of 500. The passes do not grow with the clusters."""
    passes = []
    for clusters in (2, K):
        chunks = Chunks(X, [100])
        model = fi.KMeans(clusters, seed=0).fit(chunks)
        passes.append(chunks.passes - model.n_iter_)
    assert passes == [5, 5]  # check, variance (2), sample, first assignment


def test_mapped_files_are_read_in_place(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    whole = fi.KMeans(K, seed=1).fit(X)
    assert_same(fi.KMeans(K, seed=1).fit(mapped), whole)
    assert torch.equal(fi.KMeans(K, seed=1).fit(X).predict(mapped), whole.labels_)
    for mode in ("nearest", "distance"):
        drawn = fi.FeatureSampler(mapped, 20, n_clusters=K, mode=mode, seed=2)
        expected = fi.FeatureSampler(X, 20, n_clusters=K, mode=mode, seed=2)
        assert torch.equal(drawn.indices, expected.indices)


def test_a_dataloader_is_chunks_and_the_global_generator_is_left_alone() -> None:
    rng = torch.get_rng_state()
    loader = DataLoader(TensorDataset(X, torch.arange(N)), batch_size=33)
    assert_same(fi.KMeans(K, seed=1).fit(loader), fi.KMeans(K, seed=1).fit(X))
    assert torch.equal(torch.get_rng_state(), rng)


def test_partial_fit_takes_what_fit_takes() -> None:
    whole, parts = (fi.KMeans(K, seed=1).partial_fit(X[:300]).partial_fit(X[300:]) for _ in "ab")
    parts = fi.KMeans(K, seed=1).partial_fit(X[:300].numpy()).partial_fit(Chunks(X[300:], [7]))
    assert_same(parts, whole)


def test_blocks_of_tensors_share_memory() -> None:
    for rows, block in Blocks("test", X):
        assert block.data_ptr() == X[rows].data_ptr()
        assert len(block) <= 64


class TestBadInput:
    def test_an_iterator(self) -> None:
        with pytest.raises(TypeError, match=r"generator, which can be read only once"):
            fi.KMeans(K).fit(x for x in X.split(100))

    def test_chunks_that_change(self) -> None:
        chunks = [X[:100], X[100:200]]

        class Growing:
            def __iter__(self) -> Iterator[Tensor]:
                yield from chunks
                chunks.append(X[:50])

        with pytest.raises(ValueError, match="x gave 200 rows at first and 250 later"):
            fi.KMeans(K).fit(Growing())

    def test_chunks_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"chunk at row 100 is \[400, 5\] torch.float32"):
            fi.KMeans(K).fit([X[:100], X[100:, :5]])
        with pytest.raises(ValueError, match=r"chunk at row 100 is .* torch.float64"):
            fi.KMeans(K).fit([X[:100], X[100:].double()])
        with pytest.raises(ValueError, match="x gave no chunk"):
            fi.KMeans(K).fit([])
        with pytest.raises(ValueError, match=r"x must be 2-D, got shape \[6\]"):
            fi.KMeans(K).fit([X[0]])
        with pytest.raises(TypeError, match="x must be a torch.Tensor, got int"):
            fi.KMeans(K).fit(7)  # type: ignore[arg-type]

    def test_nan_names_its_row(self) -> None:
        bad = X.clone()
        bad[333, 2] = float("nan")
        with pytest.raises(ValueError, match="row 333 of x has NaN or inf"):
            fi.KMeans(K).fit([bad[:200], bad[200:]])

    def test_too_few_rows(self) -> None:
        with pytest.raises(ValueError, match="x has 4 rows, fewer than n_clusters = 5"):
            fi.KMeans(K).fit([X[:2], X[2:4]])
