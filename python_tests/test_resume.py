"""Interrupted passes go on: same rows, nothing read twice, nothing of another model or data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interruptible import BATCH, LABELS, N, Rows, Stream, X, loader, net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastif_ext as fi
from fastif_ext import saving
from fastif_ext.samplers import checkpoint

M = 20
BATCHES = N // BATCH

DRAW: dict[str, Callable[..., fi.SubsetSampler]] = {
    "all": fi.AllRows.from_loader,
    "random": lambda *a, **k: fi.RandomSampler.from_loader(*a, M, **k),
    "stratified": lambda *a, **k: fi.StratifiedSampler.from_loader(*a, M, **k),
    "logit": lambda *a, **k: fi.LogitSampler.from_loader(*a, 6, **k),
    "logit-by-label": lambda *a, **k: fi.LogitSampler.from_loader(*a, 6, by_label=True, **k),
    "curvature": lambda *a, **k: fi.CurvatureSampler.from_loader(*a, M, **k),
    "systematic": lambda *a, **k: fi.CurvatureSampler.from_loader(
        *a, M, method="systematic", layer="penultimate", **k
    ),
    "residual": lambda *a, **k: fi.ResidualSampler.from_loader(*a, M, **k),
    "nearest": lambda *a, **k: fi.FeatureSampler.from_loader(*a, M, **k),
    "distance": lambda *a, **k: fi.FeatureSampler.from_loader(*a, M, mode="distance", **k),
}


def assert_same(a: fi.SubsetSampler, b: fi.SubsetSampler) -> None:
    assert a.n == b.n == N
    assert torch.equal(a.indices, b.indices)
    assert torch.equal(a.weights, b.weights)


@pytest.mark.parametrize("name", DRAW)
@settings(max_examples=8, deadline=None)
@given(
    stops=st.lists(st.integers(1, BATCHES), min_size=1, max_size=3, unique=True),
    iterable=st.booleans(),
)
def test_interrupted_at_any_batch(name: str, stops: list[int], iterable: bool) -> None:
    model, draw = net(), DRAW[name]
    whole = draw(model, loader(Rows()), progress=False)
    kind = Stream if iterable else Rows
    with TemporaryDirectory() as folder:
        state, done = Path(folder) / "state", 0
        for stop in sorted(stops):
            with pytest.raises(KeyboardInterrupt):
                draw(model, loader(kind(stop * BATCH - 1)), progress=False, state=state)
            assert state.exists() == (stop > 1)
            done = stop - 1
        data = Rows()
        final: Any = Stream() if iterable else data
        assert_same(draw(model, loader(final), progress=False, state=state), whole)
        if not iterable:  # the first batch is read to see whether the data is the same
            assert data.loaded == [*range(BATCH), *range(done * BATCH, N)]
        assert list(Path(folder).iterdir()) == []


def test_the_model_is_not_run_again_and_the_bar_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, state = net(), tmp_path / "state"
    rows: list[int] = []
    hook = model.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    with pytest.raises(KeyboardInterrupt):
        fi.LogitSampler.from_loader(model, loader(Rows(45)), 6, state=state)
    fi.LogitSampler.from_loader(model, loader(Rows()), 6, state=state)
    hook.remove()
    assert sum(rows) == N
    second = capsys.readouterr().err.split("logits:")[-1]
    assert f"{BATCHES}/{BATCHES}" in second
    assert "batch/s" in second


def test_a_model_that_raises_leaves_a_state_too(tmp_path: Path) -> None:
    model, state = net(), tmp_path / "state"
    whole = fi.CurvatureSampler.from_loader(model, loader(Rows()), M, progress=False)
    calls = 0

    def fail(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("out of luck")

    hook = model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        fi.CurvatureSampler.from_loader(model, loader(Rows()), M, progress=False, state=state)
    hook.remove()
    assert torch.load(state, weights_only=True)["batches"] == 4
    again = fi.CurvatureSampler.from_loader(model, loader(Rows()), M, progress=False, state=state)
    assert_same(again, whole)


class TestRefused:
    @pytest.fixture
    def state(self, tmp_path: Path) -> Path:
        with pytest.raises(KeyboardInterrupt):
            self.draw(net(), Rows(50), tmp_path / "state")
        return tmp_path / "state"

    @staticmethod
    def draw(model: nn.Module, data: Any, state: Path, k: int = 6, seed: int = 0) -> Any:
        quiet: Any = {"progress": False, "seed": seed, "state": state}
        return fi.LogitSampler.from_loader(model, loader(data), k, **quiet)

    def test_another_model(self, state: Path) -> None:
        changed = net()
        changed[2].bias.data[1] += 1e-6
        with pytest.raises(ValueError, match=r"state.*does not match: model is .* or delete it"):
            self.draw(changed, Rows(), state)

    def test_other_data(self, state: Path) -> None:
        with pytest.raises(ValueError, match="does not match: data: rows is 90 there and 80 here"):
            self.draw(net(), TensorDataset(X[:80], LABELS[:80]), state)
        with pytest.raises(ValueError, match="does not match: data: first batch is"):
            self.draw(net(), TensorDataset(X + 1, LABELS), state)
        other_size = DataLoader(Rows(), batch_size=9)
        with pytest.raises(ValueError, match="data: batches is 9 there and 10 here"):
            fi.LogitSampler.from_loader(net(), other_size, 6, state=state, progress=False)

    def test_other_arguments(self, state: Path) -> None:
        with pytest.raises(ValueError, match="arguments: samples_per_class is 6 there and 7 here"):
            self.draw(net(), Rows(), state, k=7)
        with pytest.raises(ValueError, match="arguments: seed is 0 there and 1 here"):
            self.draw(net(), Rows(), state, seed=1)
        with pytest.raises(ValueError, match="sampler is 'LogitSampler' there"):
            fi.RandomSampler.from_loader(None, loader(Rows()), 6, state=state, progress=False)

    def test_the_refused_state_stays(self, state: Path) -> None:
        before = state.read_bytes()
        with pytest.raises(ValueError, match="does not match"):
            self.draw(net(), Rows(), state, k=7)
        assert state.read_bytes() == before

    @pytest.mark.parametrize("content", [b"", b"not a state", b"PK\x03\x04 cut off"])
    def test_another_file(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "thesis.txt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"thesis.txt is not the state of a sampler"):
            self.draw(net(), Rows(), path)
        torch.save({"weights": X}, path)
        with pytest.raises(ValueError, match=r"thesis.txt is not the state of a sampler"):
            self.draw(net(), Rows(), path)


def test_a_write_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail_in_the_middle() -> None:
        with saving.replacing(path) as file:
            file.write(b"half of the new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_in_the_middle()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"

    with path.open("rb") as reader:  # who reads meanwhile reads the old file, all of it
        with saving.replacing(path) as file:
            file.write(b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


def test_large_states_are_saved_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each save takes a second of a clock that is ours, so 20 seconds pass between two."""
    now = [0.0]
    saves = []

    def save(*args: Any, **kwargs: Any) -> None:
        now[0] += 1
        saves.append(now[0])

    monkeypatch.setattr(saving, "SAVE_EVERY", 2.0)
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoint.torch, "save", save)
    model = net()
    hook = model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 1))
    data = TensorDataset(X, LABELS)
    fi.LogitSampler.from_loader(
        model, DataLoader(data, batch_size=2), 6, state=tmp_path / "s", progress=False
    )
    hook.remove()
    assert saves == [3.0, 24.0, 45.0]


SLOW = """
    import sys, time, torch
    import fastif_ext as fi
    from fastif_ext import saving
    sys.path.insert(0, {here!r})
    from test_resume import LABELS, M, X, loader, net

    saving.SAVE_EVERY, saving.SHARE = 0.0, 1e9  # all it does is to save
    model = net()
    model.register_forward_hook(lambda *_: time.sleep(0.002))
    data = torch.utils.data.TensorDataset(X.repeat(200, 1), LABELS.repeat(200))
    print("ready", flush=True)
    sampler = fi.CurvatureSampler.from_loader(
        model, loader(data), M, method="systematic", progress=False, state={state!r}
    )
    print(sampler.indices.tolist(), flush=True)
"""


def test_kill_in_the_middle_of_writing(tmp_path: Path) -> None:
    """Killed again and again, with no chance to clean up, a pass still comes to its end."""
    state = tmp_path / "state"
    code = textwrap.dedent(SLOW.format(here=str(Path(__file__).parent), state=str(state)))
    progress = []
    for delay in (0.3, 0.21):
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
        progress.append(torch.load(state, weights_only=True)["batches"])
    assert progress == sorted(set(progress))  # each went on where the one before was killed
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    data = TensorDataset(X.repeat(200, 1), LABELS.repeat(200))
    whole = fi.CurvatureSampler.from_loader(
        net(), loader(data), M, method="systematic", progress=False
    )
    assert done.stdout == f"ready\n{whole.indices.tolist()}\n"
    assert list(tmp_path.iterdir()) == []
