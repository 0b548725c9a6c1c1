"""Tokens as rows, and per-class quotas for the classes that occur."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fastif_ext as fi
from fastif_ext.memory import peak_memory
from fastif_ext.samplers.curvature import CurvatureFold
from fastif_ext.samplers.logit import LogitFold
from fastif_ext.samplers.residual import ResidualFold
from fastif_ext.stream import ExtractedBatch, stream

B, T, V = 12, 7, 11  # sequences, tokens, vocabulary


@pytest.fixture
def sequences() -> TensorDataset:
    ids = torch.randint(V, (B, T))
    labels = torch.cat([ids[:, 1:], torch.full((B, 1), -100)], 1)
    labels[3] = -100  # a sequence without labels
    labels[5, :4] = -100  # a prompt
    return TensorDataset(ids, labels)


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(V, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, V))


class TestRows:
    def test_extract_takes_the_labelled_tokens_in_order(
        self, model: nn.Module, sequences: TensorDataset
    ) -> None:
        ids, labels = sequences.tensors
        got = fi.extract(model, DataLoader(sequences, 5), layer="penultimate", progress=False)
        kept = labels.flatten() != -100
        torch.testing.assert_close(got.logits, model(ids).detach().flatten(0, 1)[kept])
        torch.testing.assert_close(got.features, model[:3](ids).detach().flatten(0, 1)[kept])
        assert got.labels is not None
        assert torch.equal(got.labels, labels.flatten()[kept])
        assert len(got.logits) == int(kept.sum()) < B * T

    def test_without_labels_all_tokens_are_rows(
        self, model: nn.Module, sequences: TensorDataset
    ) -> None:
        got = fi.extract(model, DataLoader(TensorDataset(sequences.tensors[0]), 5), progress=False)
        assert got.logits.shape == (B * T, V)

    def test_row_numbers_go_on_from_batch_to_batch(
        self, model: nn.Module, sequences: TensorDataset
    ) -> None:
        row = 0
        for batch in stream(model, DataLoader(sequences, 1), progress=False):
            assert batch.row_offset == row
            row += len(batch.logits)
        assert row == int((sequences.tensors[1] != -100).sum())

    def test_bad_shapes(self, model: nn.Module, sequences: TensorDataset) -> None:
        ids, labels = sequences.tensors
        with pytest.raises(ValueError, match=r"so labels must be \[5, 7\], with -100 .* got \[5\]"):
            fi.extract(model, DataLoader(TensorDataset(ids, labels[:, 0]), 5), progress=False)
        mean = lambda ids: ids.double().mean(1, keepdim=True)  # noqa: E731
        with pytest.raises(ValueError, match=r"features \[batch, T, ...\] of the same tokens"):
            fi.extract(model, DataLoader(sequences, 5), layer=mean, progress=False)
        with pytest.raises(ValueError, match=r"labels have shape \[5, 7\]; .*TokenRows"):
            fi.RandomSampler.from_loader(model, DataLoader(sequences, 5), 3, progress=False)


class Listed(Dataset[Any]):
    """The same sequences as a data set of another kind, of several lengths."""

    def __init__(self, sequences: TensorDataset) -> None:
        self.rows = [(ids[: i + 2], labels[: i + 2]) for i, (ids, labels) in enumerate(sequences)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.rows[i]


class TestTokenRows:
    def test_are_the_rows_of_a_pass(self, model: nn.Module, sequences: TensorDataset) -> None:
        got = fi.extract(model, DataLoader(sequences, 5), progress=False)
        rows = fi.TokenRows(sequences)
        one_by_one = fi.extract(fi.TokenModel(model), DataLoader(rows, 9), progress=False)
        torch.testing.assert_close(one_by_one.logits, got.logits)
        assert one_by_one.labels is not None
        assert torch.equal(one_by_one.labels, got.labels)
        sampler = fi.StratifiedSampler.from_loader(None, DataLoader(rows, 9), 15, progress=False)
        assert sampler.n == len(rows) == len(got.logits)

    def test_sequences_of_several_lengths(self, sequences: TensorDataset) -> None:
        listed = Listed(sequences)
        rows = fi.TokenRows(listed)
        expected = [
            (i, t) for i, (_, y) in enumerate(listed.rows) for t in range(len(y)) if y[t] != -100
        ]
        assert len(rows) == len(expected)
        for row, (i, t) in enumerate(expected):
            (ids, position), label = rows[row]
            assert torch.equal(ids, listed.rows[i][0])
            assert (int(position), int(label)) == (t, int(listed.rows[i][1][t]))

    def test_curvature_of_a_block_on_sampled_tokens(
        self, model: nn.Module, sequences: TensorDataset
    ) -> None:
        """The weighted Gauss-Newton matrix of all tokens, against one made of the definition."""
        model.double()
        params = ["model.1.*"]
        rows = fi.TokenRows(sequences)
        sampler = fi.CurvatureSampler.from_loader(
            model, DataLoader(sequences, 4), len(rows), progress=False
        )
        G = fi.GaussNewton(
            fi.TokenModel(model),
            DataLoader(rows, 16, sampler=sampler),
            weights=sampler.weights,
            params=params,
        )
        ids, labels = sequences.tensors
        kept = labels.flatten() != -100
        weights = [p for name, p in model.named_parameters() if name.startswith("1.")]

        def logits(weight: Tensor, bias: Tensor) -> Tensor:
            replaced = {"1.weight": weight, "1.bias": bias}
            return torch.func.functional_call(model, replaced, (ids,)).flatten(0, 1)[kept]

        J = torch.cat(
            [j.flatten(2) for j in torch.func.jacrev(logits, argnums=(0, 1))(*weights)], 2
        )  # [n, V, p]
        p = logits(*weights).softmax(1)
        S = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        dense = torch.einsum("nvp,nvw,nwq->pq", J, S, J) / len(rows)
        v = torch.randn(G.dim, dtype=torch.float64)
        torch.testing.assert_close(G @ v, dense @ v, rtol=1e-5, atol=1e-9)

    def test_bad_input(self, sequences: TensorDataset) -> None:
        with pytest.raises(ValueError, match=r"labels of sequence 0 have shape \[\]"):
            fi.TokenRows(TensorDataset(sequences.tensors[0], torch.zeros(B, dtype=torch.int64)))
        stream_: Any = (x for x in sequences)
        with pytest.raises(TypeError, match="has no length"):
            fi.TokenRows(stream_)


class TestClasses:
    """Quotas per class on logits of many classes, of which few occur."""

    N, Y = 400, 50

    @pytest.fixture
    def logits(self) -> Tensor:
        return torch.randn(self.N, self.Y)

    @pytest.fixture
    def labels(self) -> Tensor:
        """Class 7 once, class 9 twice, the rest in 20, 21 and 22."""
        labels = 20 + torch.arange(self.N) % 3
        labels[17], labels[100], labels[300] = 7, 9, 9
        return labels

    @pytest.mark.parametrize("replacement", [False, True])
    def test_a_choice_draws_what_all_classes_draw(self, logits: Tensor, replacement: bool) -> None:
        chosen = torch.tensor([30, 4, 4, 21])
        some = fi.LogitSampler(logits, 3, classes=chosen, replacement=replacement, seed=1)
        every = fi.LogitSampler(logits, 3, replacement=replacement, seed=1)
        expected = every.indices.view(self.Y, 3)[[4, 21, 30]]
        assert torch.equal(some.indices, expected.flatten())
        torch.testing.assert_close(some.weights, torch.full((9,), 1 / 9))

    @pytest.mark.parametrize("replacement", [False, True])
    def test_occurring_classes_give_what_they_have(
        self, logits: Tensor, labels: Tensor, replacement: bool
    ) -> None:
        sampler = fi.LogitSampler(
            logits, 4, labels=labels, classes="occurring", replacement=replacement, seed=2
        )
        counts = labels[sampler.indices].bincount()
        one, two = (4, 4) if replacement else (1, 2)
        assert counts[[7, 9, 20, 21, 22]].tolist() == [one, two, 4, 4, 4]
        assert counts.sum() == len(sampler)
        torch.testing.assert_close(sampler.weights.sum(), torch.tensor(1.0))

    def test_by_label_has_the_law_of_the_softmax_within_the_label(self) -> None:
        """Rows of class 0 with probabilities 1:2:3, drawn first: z-test, false alarm 1e-5."""
        p = torch.tensor([0.1, 0.2, 0.3, 0.9])
        logits = torch.stack([p, 1 - p], 1).log()
        labels = torch.tensor([0, 0, 0, 1])
        draws = 4000
        first = torch.tensor(
            [
                int(fi.LogitSampler(logits, 1, labels=labels, seed=s).indices[0])
                for s in range(draws)
            ]
        )
        share = first.bincount(minlength=3)[:3] / draws
        expected = torch.tensor([1, 2, 3]) / 6
        z = (share - expected) / (expected * (1 - expected) / draws).sqrt()
        assert z.abs().max() < 4.5

    def test_memory_is_that_of_the_classes_that_occur(self, logits: Tensor, labels: Tensor) -> None:
        fold = LogitFold(4, by_label=True, classes="occurring")
        fold.update(ExtractedBatch(0, logits, None, labels))
        assert fold.state_dict()["state"]["rows"].shape == (5, 4)
        chosen = LogitFold(4, classes=labels.unique())
        chosen.update(ExtractedBatch(0, logits, None, None))
        assert chosen.state_dict()["state"]["rows"].shape == (5, 4)

    def test_no_class_of_a_batch_is_chosen(self, logits: Tensor, labels: Tensor) -> None:
        """Batches in which a class does not occur, and one without any that was chosen."""
        fold = LogitFold(1, by_label=True, classes=torch.tensor([7, 9]))
        for first in (0, 50, 101):
            part = slice(first, {0: 50, 50: 101, 101: self.N}[first])
            fold.update(ExtractedBatch(first, logits[part], None, labels[part]))
        drawn = fold.finish().indices
        assert drawn[0] == 17
        assert drawn[1] in (100, 300)

    def test_bad_input(self, logits: Tensor, labels: Tensor) -> None:
        with pytest.raises(ValueError, match="classes must be between 0 and 49.* got 50"):
            fi.LogitSampler(logits, 2, classes=torch.tensor([50]))
        with pytest.raises(ValueError, match=r"class numbers from 0, got \[-1\]"):
            fi.LogitSampler(logits, 2, classes=torch.tensor([-1]))
        with pytest.raises(ValueError, match=r"class numbers from 0, got \[\]"):
            fi.LogitSampler(logits, 2, classes=torch.tensor([], dtype=torch.int64))
        with pytest.raises(ValueError, match="needs labels="):
            fi.LogitSampler(logits, 2, classes="occurring")
        with pytest.raises(ValueError, match="'all', 'occurring' or a tensor .* got 'some'"):
            fi.LogitSampler(logits, 2, classes="some")
        with pytest.raises(ValueError, match="class 0 has only 0 rows"):
            fi.LogitSampler(logits, 1, labels=labels)
        with pytest.raises(ValueError, match="class 7 has only 1 rows"):
            fi.LogitSampler(logits, 2, labels=labels, classes=torch.tensor([7, 20]))


def test_blocks_of_wide_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and positions are taken some rows at a time, so that no n x Y copy is made."""
    from fastif_ext.samplers import base, curvature, logit, residual

    logits, labels = torch.randn(100, 30).bfloat16(), torch.arange(100) % 30

    def drawn() -> list[Tensor]:
        return [
            fi.CurvatureSampler(logits, 20, method="systematic").indices,
            fi.ResidualSampler(logits, labels, 20).indices,
            fi.LogitSampler(logits, 2, labels=labels).indices,
        ]

    whole = drawn()
    for module in (curvature, residual, logit):
        monkeypatch.setattr(module, "row_blocks", lambda z: base.row_blocks(z, 30 * 7))
    monkeypatch.setattr(logit, "LABEL_ROWS", 13)
    assert all(torch.equal(a, b) for a, b in zip(drawn(), whole, strict=True))


def test_cross_entropy_ignores_what_is_left_out(model: nn.Module, sequences: TensorDataset) -> None:
    """The mean over rows is the loss a language model is trained with."""
    ids, labels = sequences.tensors
    got = fi.extract(model, DataLoader(sequences, 5), progress=False)
    trained = cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(cross_entropy(got.logits, got.labels), trained.detach())


def test_wide_logits_are_not_copied() -> None:
    """1500 rows of 60,000 classes in bfloat16, 180 MB: a float32 copy would take 360 MB."""
    logits = torch.randn(100, 60_000).bfloat16().repeat(15, 1)
    batch = ExtractedBatch(0, logits, None, torch.arange(1500) % 40)
    for fold in (
        CurvatureFold(10, method="systematic"),
        LogitFold(2, by_label=True, classes="occurring"),
        ResidualFold(10),
    ):
        with peak_memory() as peak:
            fold.update(batch)
        if peak.megabytes is None:
            pytest.skip("the system does not tell the peak")
        assert peak.megabytes < 260, fold.name
