"""Batches of every kind of data, subsets of rows, and eval mode."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fastif_ext as fi
from fastif_ext import data
from fastif_ext.data import loader, map_style

X, Y = torch.arange(20.0).view(10, 2), torch.arange(10)


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


class Doubled(TensorDataset):
    """A TensorDataset whose rows are not its tensors' rows."""

    def __getitem__(self, i: int) -> Any:
        assert isinstance(i, int)
        x, y = super().__getitem__(i)
        return 2 * x, y


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return zip(X, Y, strict=True)


@pytest.mark.parametrize(
    ("source", "sizes"),
    [
        ((X, Y), [4, 4, 2]),
        (TensorDataset(X, Y), [4, 4, 2]),
        (list(zip(X, Y, strict=True)), [4, 4, 2]),
        (X, None),
        (DataLoader(TensorDataset(X, Y), batch_size=3), [3, 3, 3, 1]),
        (Endless(), [4, 4, 2]),
    ],
)
def test_batches_keep_every_row_in_order(source: Any, sizes: list[int] | None) -> None:
    if sizes is None:
        with pytest.raises(TypeError, match="a Dataset or a DataLoader, got Tensor"):
            next(data.batches(source))
        return
    got = list(data.batches(source, 4))
    assert [len(targets) for _, targets in got] == sizes
    assert torch.equal(torch.cat([inputs for inputs, _ in got]), X)
    assert torch.equal(torch.cat([targets for _, targets in got]), Y)


def test_a_subclass_of_tensor_dataset_keeps_its_own_rows() -> None:
    source = Doubled(X, Y)
    assert torch.equal(torch.cat([x for x, _ in data.batches(source, 4)]), 2 * X)
    part = data.take(source, torch.tensor([3, 3, 0]))
    assert torch.equal(next(data.batches(part))[0], 2 * X[[3, 3, 0]])


@pytest.mark.parametrize("kind", ["tensors", "TensorDataset", "Dataset", "dict"])
def test_take_repeats_and_reorders(kind: str) -> None:
    rows = torch.tensor([7, 0, 7, 9])
    pairs: Any = {
        "tensors": (X, Y),
        "TensorDataset": TensorDataset(X, Y),
        "Dataset": Doubled(X / 2, Y),
        "dict": ({"x": X}, Y),
    }[kind]
    assert data.count(pairs) == 10
    part = data.take(pairs, rows)
    assert data.count(part) == 4
    inputs, targets = next(data.batches(part))
    assert torch.equal(inputs["x"] if kind == "dict" else inputs, X[rows])
    assert torch.equal(targets, Y[rows])


def test_count_needs_a_length() -> None:
    with pytest.raises(TypeError, match="Endless has no length"):
        data.count(Endless())


@pytest.mark.parametrize(
    ("batch", "inputs", "labels"),
    [
        ({"x": 1, "labels": 2}, {"x": 1}, 2),
        ({"x": 1, "label": 2}, {"x": 1}, 2),
        ({"x": 1}, {"x": 1}, None),
        ((1, 2), 1, 2),
        ([1], 1, None),
        (1, 1, None),
    ],
)
def test_split_batch(batch: Any, inputs: Any, labels: Any) -> None:
    assert data.split_batch(batch) == (inputs, labels)


def test_split_batch_refuses_three_parts() -> None:
    with pytest.raises(ValueError, match=r"tuple of 3.*collate_fn"):
        data.split_batch((1, 2, 3))


@pytest.mark.parametrize(
    ("pair", "message"), [((X, Y[:9]), "10 inputs and 9 targets"), ((X, Y, Y), "tuple of 3")]
)
def test_tensors_that_do_not_match(pair: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(data.batches(pair))


def test_tree_map_keeps_the_structure() -> None:
    value = [Pair(X, Y), {"k": (X, "text")}, OrderedDict(z=Y)]
    got = data.tree_map(lambda t: t[:1], value)
    assert isinstance(got[0], Pair)
    assert got[0].b.tolist() == [0]
    assert got[1]["k"][1] == "text"
    assert got[2]["z"].tolist() == [0]
    assert len(data.tensors_of(value)) == 4
    assert data.batch_rows(value) == 10


def test_reading_a_dataset_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    for source in (TensorDataset(X, Y), Doubled(X, Y)):
        list(data.batches(source))
    assert torch.equal(torch.get_rng_state(), before)


def test_merged_batches_keep_rows_and_order() -> None:
    source = DataLoader(TensorDataset(X, Y), batch_size=3)
    got = list(data.merged(data.batches(source), 7))
    assert [len(y) for _, y in got] == [6, 4]
    assert torch.equal(torch.cat([x for x, _ in got]), X)
    assert torch.equal(torch.cat([y for _, y in got]), Y)


def test_merged_leaves_unequal_shapes_apart() -> None:
    batches: list[Any] = [
        ({"ids": torch.zeros(2, 5)}, Y[:2]),
        ({"ids": torch.zeros(2, 5)}, Y[2:4]),
        ({"ids": torch.zeros(2, 6)}, Y[4:6]),  # padded to another length
        ({"ids": torch.zeros(2, 6), "flag": torch.tensor(1)}, Y[6:8]),  # not one row each
        ({"ids": torch.zeros(2, 6), "flag": torch.tensor(1)}, Y[8:]),
    ]
    got = list(data.merged(batches, 100))
    assert [x["ids"].shape for x, _ in got] == [(4, 5), (2, 6), (2, 6), (2, 6)]
    assert torch.equal(torch.cat([y for _, y in got]), Y)


def test_evaluating_restores_each_flag() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(1)))
    model[1].eval()
    model[1][1].train()
    before = [m.training for m in model.modules()]
    inside: list[bool] = []
    with pytest.raises(IndexError), data.evaluating(model):
        inside.extend(m.training for m in model.modules()) or inside[99]
    assert not any(inside)
    assert [m.training for m in model.modules()] == before
    assert before == [True, True, False, False, True]


def test_call_passes_a_dict_by_name() -> None:
    assert data.call(lambda *, a: a + 1, {"a": 1}) == 2
    assert data.call(lambda a: a, 3) == 3


def test_an_empty_dataset_gives_no_batch() -> None:
    class Empty(Dataset[Any]):
        def __len__(self) -> int:
            return 0

        def __getitem__(self, i: int) -> Any:
            raise IndexError(i)

    assert list(data.batches(Empty())) == []
    assert list(data.batches(TensorDataset(X[:0], Y[:0]))) == []


class TestMapStyle:
    """What a user passes where rows are read by number."""

    X, Y = torch.randn(12, 3), torch.arange(12) % 3

    def test_pairs_are_data_sets(self) -> None:
        pair = map_style("data", (self.X, self.Y))
        assert isinstance(pair, TensorDataset)
        halves = {"a": self.X[:, :2], "b": self.X[:, 2:]}
        rows = map_style("data", (halves, self.Y))
        inputs, targets = next(iter(loader(rows, 5)))
        assert torch.equal(inputs["a"], self.X[:5, :2])
        assert torch.equal(targets, self.Y[:5])

    def test_what_behaves_like_a_data_set_is_one(self) -> None:
        """A list of rows, or a data set of Hugging Face, which is no torch Dataset."""
        listed: Any = list(zip(self.X, self.Y.tolist(), strict=True))
        assert map_style("data", listed) is listed
        model, loss = torch.nn.Linear(3, 3), torch.nn.functional.cross_entropy
        for got, want in (
            (fi.mean_gradient(model, loss, d) for d in (listed, (self.X, self.Y))),
            (
                fi.influence(model, loss, torch.arange(3), d, damping=0.1).delta
                for d in (listed, (self.X, self.Y))
            ),
        ):
            torch.testing.assert_close(got, want)

    def test_edits_take_them(self) -> None:
        model, pair = torch.nn.Linear(3, 3), (self.X, self.Y)
        data, how = TensorDataset(*pair), {"damping": 0.1, "curvature": "gauss-newton"}
        for edit in (
            lambda d: fi.remove_class(model, d, 1, test=d, **how).delta,
            lambda d: fi.remove_rows(model, d, torch.arange(3), test=d, **how).delta,
            lambda d: (
                fi.correct_labels(
                    model, d, torch.arange(2), torch.tensor([2, 2]), test=d, **how
                ).delta
            ),
            lambda d: torch.tensor(fi.class_metrics(model, d, 1)),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert torch.equal(edit(pair), edit(data))

    def test_what_has_no_rows_by_number_is_refused(self) -> None:
        class Stream(IterableDataset):
            def __iter__(self) -> Any:
                return iter([(torch.zeros(3), 0)])

            def __len__(self) -> int:
                return 1

        data = TensorDataset(self.X, self.Y)
        for bad, word in (
            (DataLoader(data), "DataLoader; pass its .dataset"),
            (Stream(), "Stream"),
            ((self.X,), "tuple"),
            (None, "NoneType"),
        ):
            with pytest.raises(TypeError, match=f"remove_class: train must be .* got a {word}"):
                fi.remove_class(torch.nn.Linear(3, 3), bad, 1)
        with pytest.raises(ValueError, match="remove_rows: train has 12 inputs and 11 targets"):
            fi.remove_rows(torch.nn.Linear(3, 3), (self.X, self.Y[:11]), torch.arange(2))

    def test_labels_that_are_no_classes_are_refused(self) -> None:
        one_hot = torch.nn.functional.one_hot(self.Y)
        for bad in (one_hot, self.Y[:, None]):
            with pytest.raises(ValueError, match="labels must be whole numbers, one for each row"):
                fi.remove_class(torch.nn.Linear(3, 3), (self.X, bad), 1)
