"""Folds: rows taken in pieces, merged, saved and loaded give what all rows at once give."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import fastif_ext as fi
from fastif_ext.extract import ExtractedBatch
from fastif_ext.samplers.curvature import CurvatureFold
from fastif_ext.samplers.feature import FeatureFold
from fastif_ext.samplers.fold import Column, Fold
from fastif_ext.samplers.logit import LogitFold
from fastif_ext.samplers.residual import ResidualFold
from fastif_ext.samplers.uniform import AllRowsFold, RandomFold, StratifiedFold

N, Y, M = 300, 4, 40
_RNG = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(N, Y, generator=_RNG)
FEATURES = torch.randn(N, 6, generator=_RNG)
LABELS = LOGITS.argmax(1)
SCALE = FEATURES.square().sum(1) + 1

CASES: dict[str, tuple[Callable[[], Fold], Callable[[], fi.SubsetSampler]]] = {
    "all": (AllRowsFold, lambda: fi.AllRows(N)),
    "random": (lambda: RandomFold(M, seed=3), lambda: fi.RandomSampler(N, M, seed=3)),
    "stratified": (
        lambda: StratifiedFold(M, seed=3),
        lambda: fi.StratifiedSampler(LABELS, M, seed=3),
    ),
    "logit": (lambda: LogitFold(9, seed=3), lambda: fi.LogitSampler(LOGITS, 9, seed=3)),
    "logit-replacement": (
        lambda: LogitFold(9, replacement=True, seed=3),
        lambda: fi.LogitSampler(LOGITS, 9, replacement=True, seed=3),
    ),
    "logit-by-label": (
        lambda: LogitFold(9, by_label=True, seed=3),
        lambda: fi.LogitSampler(LOGITS, 9, labels=LABELS, seed=3),
    ),
    "logit-occurring": (
        lambda: LogitFold(90, by_label=True, classes="occurring", seed=3),
        lambda: fi.LogitSampler(LOGITS, 90, labels=LABELS, classes="occurring", seed=3),
    ),
    "logit-by-label-replacement": (
        lambda: LogitFold(9, by_label=True, replacement=True, seed=3),
        lambda: fi.LogitSampler(LOGITS, 9, labels=LABELS, replacement=True, seed=3),
    ),
    "logit-classes": (
        lambda: LogitFold(9, classes=torch.tensor([1, 3]), seed=3),
        lambda: fi.LogitSampler(LOGITS, 9, classes=torch.tensor([3, 1]), seed=3),
    ),
    "curvature": (
        lambda: CurvatureFold(M, seed=3),
        lambda: fi.CurvatureSampler(LOGITS, M, row_scale=SCALE, seed=3),
    ),
    "systematic": (
        lambda: CurvatureFold(M, method="systematic", seed=3),
        lambda: fi.CurvatureSampler(LOGITS, M, row_scale=SCALE, method="systematic", seed=3),
    ),
    "residual": (
        lambda: ResidualFold(M, seed=3),
        lambda: fi.ResidualSampler(LOGITS, LABELS, M, seed=3),
    ),
    "nearest": (
        lambda: FeatureFold(M, seed=3),
        lambda: fi.FeatureSampler(FEATURES, M, n_clusters=Y, seed=3),
    ),
    "distance": (
        lambda: FeatureFold(M, n_clusters=5, mode="distance", seed=3),
        lambda: fi.FeatureSampler(FEATURES, M, n_clusters=5, mode="distance", seed=3),
    ),
}


def rows(first: int, stop: int) -> ExtractedBatch:
    part = slice(first, stop)
    return ExtractedBatch(first, LOGITS[part], FEATURES[part], LABELS[part])


def folded(fold: Fold, cuts: list[int]) -> Fold:
    for first, stop in itertools.pairwise(cuts):
        fold.update(rows(first, stop))
    return fold


def saved_and_loaded(fold: Fold, fresh: Fold) -> Fold:
    buffer = io.BytesIO()
    torch.save(fold.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


def assert_same(a: fi.SubsetSampler, b: fi.SubsetSampler) -> None:
    assert type(a) is type(b)
    assert a.n == b.n
    assert torch.equal(a.indices, b.indices)
    assert torch.equal(a.weights, b.weights)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=15, deadline=None)
@given(
    cuts=st.lists(st.integers(0, N), max_size=6),
    split=st.integers(0, N),
    save=st.booleans(),
)
def test_any_cuts_merges_and_saves_give_the_sampler_of_all_rows(
    name: str, cuts: list[int], split: int, save: bool
) -> None:
    make, whole = CASES[name]
    head = folded(make(), sorted([0, split, *(c for c in cuts if c < split)]))
    tail = folded(make(), sorted([split, N, *(c for c in cuts if c > split)]))
    if save:
        head, tail = saved_and_loaded(head, make()), saved_and_loaded(tail, make())
    head.merge(tail)
    assert head.rows == N
    assert_same(head.finish(), whole())


@pytest.mark.parametrize("name", CASES)
def test_a_state_goes_on_and_empty_folds_change_nothing(name: str) -> None:
    make, whole = CASES[name]
    fold = saved_and_loaded(folded(make(), [0, 70, 71]), make())
    fold.merge(make())
    fold.update(rows(71, N))
    empty = saved_and_loaded(make(), make())
    assert empty.state_dict()["rows"] == 0
    empty.merge(fold)
    assert_same(empty.finish(), whole())


class TestRefused:
    def test_rows_out_of_order(self) -> None:
        fold = folded(LogitFold(2), [0, 100])
        before = fold.state_dict()
        with pytest.raises(ValueError, match=r"rows 0 to 99 are in, so row 100 must follow.*120"):
            fold.update(rows(120, 130))
        with pytest.raises(ValueError, match="row 100 must follow, got row 0"):
            fold.merge(folded(LogitFold(2), [0, 50]))
        assert fold.state_dict()["rows"] == before["rows"] == 100

    def test_missing_rows(self) -> None:
        with pytest.raises(ValueError, match="the rows before row 50 are missing"):
            folded(RandomFold(3), [50, 100]).finish()
        with pytest.raises(ValueError, match="there was no row to read"):
            RandomFold(3).finish()

    def test_other_sampler_or_arguments(self) -> None:
        fold = LogitFold(2, seed=1)
        with pytest.raises(ValueError, match="seed is 1 here and 2 in the other state"):
            fold.merge(LogitFold(2, seed=2))
        with pytest.raises(ValueError, match="cannot merge a RandomFold"):
            fold.merge(RandomFold(2, seed=1))
        with pytest.raises(ValueError, match="the state is one of a RandomSampler"):
            fold.load_state_dict(RandomFold(2, seed=1).state_dict())
        with pytest.raises(ValueError, match="samples_per_class is 2 here and 3"):
            fold.load_state_dict(LogitFold(3, seed=1).state_dict())

    @pytest.mark.parametrize("name", ["stratified", "logit-by-label", "residual"])
    def test_no_labels(self, name: str) -> None:
        with pytest.raises(ValueError, match="labels are needed"):
            CASES[name][0]().update(rows(0, N)._replace(labels=None))

    def test_bad_arguments_before_any_row_is_read(self) -> None:
        with pytest.raises(ValueError, match="method must be"):
            CurvatureFold(3, method="poisson")
        with pytest.raises(ValueError, match="uniform must be between 0 and 1, got -1"):
            ResidualFold(3, uniform=-1)
        with pytest.raises(ValueError, match="mode must be"):
            FeatureFold(3, mode="far")


def test_a_column_keeps_few_parts() -> None:
    column = Column()
    for i in range(1000):
        column.append(torch.tensor([i]))
        assert len(column._parts) <= 11
    assert torch.equal(column.tensor(), torch.arange(1000))


class Rows(Dataset[Any]):
    """Counts how often a row is loaded."""

    def __init__(self) -> None:
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.loaded.append(i)
        return FEATURES[i], LABELS[i]


class Endless(IterableDataset[Any]):
    """The same rows, one after the other; it does not know how many."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(FEATURES, LABELS, strict=True)


class TestFromLoader:
    @pytest.fixture
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, Y))

    @pytest.mark.parametrize("iterable", [False, True])
    def test_every_sampler_draws_what_it_draws_in_memory(
        self, model: nn.Module, iterable: bool
    ) -> None:
        loader: Any = DataLoader(Endless() if iterable else Rows(), batch_size=37)
        got = fi.extract(model, loader, layer="penultimate", progress=False)
        z, f, y = got.logits, got.features, got.labels
        assert f is not None
        assert y is not None
        scale = f.square().sum(1) + 1
        quiet: Any = {"progress": False}
        for streamed, whole in (
            (fi.AllRows.from_loader(model, loader, **quiet), fi.AllRows(N)),
            (fi.RandomSampler.from_loader(model, loader, M, **quiet), fi.RandomSampler(N, M)),
            (
                fi.StratifiedSampler.from_loader(model, loader, M, **quiet),
                fi.StratifiedSampler(y, M),
            ),
            (fi.LogitSampler.from_loader(model, loader, 9, **quiet), fi.LogitSampler(z, 9)),
            (
                fi.CurvatureSampler.from_loader(model, loader, M, layer="penultimate", **quiet),
                fi.CurvatureSampler(z, M, row_scale=scale),
            ),
            (
                fi.ResidualSampler.from_loader(model, loader, M, **quiet),
                fi.ResidualSampler(z, y, M),
            ),
            (
                fi.FeatureSampler.from_loader(model, loader, M, **quiet),
                fi.FeatureSampler(f, M, n_clusters=Y),
            ),
        ):
            assert_same(streamed, whole)

    def test_the_model_is_not_run_where_logits_are_not_needed(self) -> None:
        loader = DataLoader(Rows(), batch_size=50)
        fi.RandomSampler.from_loader(None, loader, 5, progress=False)
        fi.StratifiedSampler.from_loader(None, loader, 5, progress=False)
