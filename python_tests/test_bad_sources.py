"""Loaders, labels and files that would give wrong rows without a word: refused, or put right."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import fastif_ext as fi
from fastif_ext.cli import main
from fastif_ext.samplers import LogitFold
from fastif_ext.stream import ExtractedBatch

N, Y = 40, 3
DATA = TensorDataset(torch.randn(N, 4), torch.arange(N) % Y)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, Y))


SHUFFLES: dict[str, Callable[[], DataLoader]] = {
    "batches": lambda: DataLoader(
        DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 10, drop_last=False)
    ),
    "batches as samples": lambda: DataLoader(
        DATA, batch_size=None, sampler=BatchSampler(RandomSampler(DATA), 10, drop_last=False)
    ),
    "a rank's part": lambda: DataLoader(DATA, 10, sampler=DistributedSampler(DATA, 2, 0)),
    "by weight": lambda: DataLoader(DATA, 10, sampler=fi.WeightedRandomSampler(torch.ones(N), N)),
}


class TestLoaders:
    @pytest.mark.parametrize("kind", SHUFFLES)
    def test_drawn_rows_are_refused(self, kind: str, model: nn.Module) -> None:
        loader = SHUFFLES[kind]()
        for read in (
            lambda: fi.extract(model, loader, progress=False),
            lambda: fi.CurvatureSampler.from_loader(model, loader, 5, progress=False),
            lambda: fi.KMeans(2, seed=0).fit(loader),
        ):
            with pytest.raises(ValueError, match="loader draws its rows with a"):
                read()

    def test_an_iterator_cannot_go_on(self, model: nn.Module, tmp_path: Path) -> None:
        def batches() -> Iterator[Any]:
            yield from DataLoader(DATA, 10)

        assert len(fi.extract(model, batches(), progress=False).logits) == N
        with pytest.raises(TypeError, match="store= and state= need a loader that can be read"):
            fi.extract(model, batches(), store=tmp_path / "s", progress=False)
        with pytest.raises(TypeError, match="store= and state= need a loader that can be read"):
            fi.CurvatureSampler.from_loader(
                model, batches(), 5, state=tmp_path / "f", progress=False
            )

    def test_an_error_leaves_the_model_as_it_was(self, model: nn.Module, tmp_path: Path) -> None:
        """Whoever keeps the traceback, as an interactive session does."""
        x = DATA.tensors[0].clone()
        x[25] = torch.nan
        bad, kept = DataLoader(TensorDataset(x, DATA.tensors[1]), 10), []
        try:
            fi.CurvatureSampler.from_loader(
                model, bad, 5, layer="penultimate", state=tmp_path / "f", progress=False
            )
        except ValueError as error:
            kept.append(error)
        assert kept
        assert model.training
        assert not model[2]._forward_pre_hooks

    def test_a_state_needs_a_folder(self, model: nn.Module, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="the folder of .* does not exist"):
            fi.CurvatureSampler.from_loader(
                model, DataLoader(DATA, 10), 5, state=tmp_path / "no" / "f", progress=False
            )


class TestLabels:
    def test_each_row_needs_one(self, model: nn.Module) -> None:
        batches = [(torch.randn(3, 4), torch.zeros(7, dtype=torch.int64))]
        with pytest.raises(ValueError, match=r"a batch of 3 rows has labels of shape \[7\]"):
            fi.extract(model, batches, progress=False)

    def test_all_batches_or_none(self, model: nn.Module) -> None:
        batches = [(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)), torch.randn(2, 4)]
        with pytest.raises(ValueError, match="some batches have labels and others have none"):
            fi.extract(model, batches, progress=False)

    @pytest.mark.parametrize("targets", [3 * torch.rand(N), torch.rand(N, Y)])
    def test_real_numbers_are_no_classes(self, model: nn.Module, targets: torch.Tensor) -> None:
        loader = DataLoader(TensorDataset(DATA.tensors[0], targets), 10)
        assert fi.extract(model, loader, progress=False).labels is None
        with pytest.raises(ValueError, match="labels"):
            fi.StratifiedSampler.from_loader(model, loader, 6, progress=False)


class TestLogits:
    def test_a_row_of_nothing_but_minus_infinity_is_skipped(self) -> None:
        z, y = torch.randn(N, Y), torch.arange(N) % Y
        z[7] = -torch.inf
        assert 7 not in fi.LogitSampler(z, 5, labels=y).indices
        assert 7 not in fi.LogitSampler(z, 5).indices
        assert len(fi.ResidualSampler(z, y, 10).indices) == 10

    def test_an_update_that_fails_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fastif_ext.samplers.logit.LABEL_ROWS", 10)
        z, y = torch.randn(N, Y), torch.arange(N) % Y
        fold, whole = (LogitFold(2, by_label=True) for _ in range(2))
        calls: list[int] = []
        by_label = LogitFold._by_label

        def failing(self: Any, *arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise MemoryError
            return by_label(self, *arguments)

        monkeypatch.setattr(LogitFold, "_by_label", failing)
        with pytest.raises(MemoryError):
            fold.update(ExtractedBatch(0, z, None, y))
        for f in (fold, whole):
            f.update(ExtractedBatch(0, z, None, y))
        assert torch.equal(fold.finish().indices, whole.finish().indices)

    def test_width_and_count(self) -> None:
        with pytest.raises(ValueError, match="samples_per_class must be at least 1, got 0"):
            fi.LogitSampler(torch.randn(5, 2), 0)
        fold = LogitFold(2)
        fold.update(ExtractedBatch(0, torch.randn(5, 2), None, None))
        with pytest.raises(ValueError, match="logits have 3 columns from row 5 on, and had 2"):
            fold.update(ExtractedBatch(5, torch.randn(5, 3), None, None))

    @pytest.mark.parametrize("sampler", [fi.CurvatureSampler, fi.ResidualSampler])
    def test_a_seed_is_looked_at_before_the_pass(self, sampler: Any, model: nn.Module) -> None:
        with pytest.raises(ValueError, match="seed must be an int of 64 bits"):
            sampler.from_loader(model, None, 5, seed=2**64 - 1)

    def test_a_class_of_no_probability_is_not_drawn(self) -> None:
        z = torch.zeros(6, 3)
        z[:, 2] = -torch.inf
        found = fi.calibration(z, torch.tensor([0, 1, 2, 0, 1, 2]))
        assert found.marginal == pytest.approx((4 / 6, 4 / 6))

    def test_features_of_half_precision_do_not_overflow(self) -> None:
        wide = nn.Linear(4, 512)
        nn.init.constant_(wide.weight, 10.0)
        model = nn.Sequential(wide, nn.Linear(512, Y)).half()
        x = torch.ones(20, 4, dtype=torch.float16)
        sampler = fi.CurvatureSampler.from_loader(
            model, DataLoader(x, 10), 5, layer="penultimate", progress=False
        )
        assert len(sampler) == 5

    def test_under_another_default_dtype(self, model: nn.Module) -> None:
        x, y = torch.randn(N, 4), torch.arange(N) // 20  # batches hold different labels
        torch.set_default_dtype(torch.float64)
        try:
            loader = DataLoader(TensorDataset(x, y), 10)
            sampler = fi.LogitSampler.from_loader(
                model, loader, 3, by_label=True, classes="occurring", progress=False
            )
            for s in (sampler, fi.RandomSampler(9, 3), fi.AllRows(4)):
                assert s.weights.dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)


class TestFiles:
    def test_a_cut_store_is_not_gone_on_with(self, model: nn.Module, tmp_path: Path) -> None:
        class Breaks(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner, self.calls = inner, 0

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.calls += 1
                if self.calls == 3:
                    raise KeyboardInterrupt
                return self.inner(x)

        broken, loader, store = Breaks(model), DataLoader(DATA, 10), tmp_path / "s"
        with contextlib.suppress(KeyboardInterrupt):
            fi.extract(broken, loader, store=store, progress=False)
        with (store / "logits.npy").open("r+b") as file:
            file.truncate(150)
        with pytest.raises(ValueError, match="is damaged: logits.npy has 150 bytes"):
            fi.extract(broken, loader, store=store, progress=False)

    def test_a_method_of_another_network_is_another_layer(
        self, model: nn.Module, tmp_path: Path
    ) -> None:
        class Encoder(nn.Linear):
            def encode(self, x: torch.Tensor) -> torch.Tensor:
                return self(x)

        a, b = Encoder(4, 2), Encoder(4, 2)
        loader = DataLoader(DATA, 10)
        for name, layers in (
            ("method", (a.encode, b.encode)),
            ("partial", (partial(torch.matmul, other=torch.ones(4, k)) for k in (1, 2))),
        ):
            first, second = layers
            fi.extract(model, loader, layer=first, store=tmp_path / name, progress=False)
            with pytest.raises(ValueError, match="does not match: layer"):
                fi.extract(model, loader, layer=second, store=tmp_path / name, progress=False)

    def test_a_manifest_without_its_parts(self, tmp_path: Path) -> None:
        (tmp_path / "manifest.json").write_text('{"format": "fastif_ext store 1"}')
        with pytest.raises(ValueError, match="store"):
            fi.open_store(tmp_path)

    def test_values_whose_distances_overflow(self) -> None:
        x = torch.randn(40, 3) * 1e19
        with pytest.raises(ValueError, match="whose squared distances overflow float32; divide x"):
            fi.KMeans(2, seed=0).fit(x)
        fi.KMeans(2, seed=0).fit(x.double())
        with pytest.raises(ValueError, match="init holds NaN"):
            fi.KMeans(2, init=torch.full((2, 3), torch.nan))


class TestCommandLine:
    def test_outputs_are_looked_at_first(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for options in (["--json", str(tmp_path)], ["--save", str(tmp_path / "no" / "m.pt")]):
            assert main(["remove-class", "--data", "digits", "--class", "3", *options]) == 2
            said = capsys.readouterr()
            assert "give the name of a file in an existing folder" in said.err
            assert "Training" not in said.out

    def test_a_demo_of_no_seeds(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["demo", "--seeds", "0", "--output", str(tmp_path)]) == 2
        assert "seeds must be at least 1, got 0" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
