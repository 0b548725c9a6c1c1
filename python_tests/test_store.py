"""Stores: what extract gives in memory, from mapped files; resumed, refused, never half there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interruptible import LABELS, N, Rows, Stream, X, Y, loader, net
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fastif_ext as fi


def extract(store: Path | None, data: Any = None, model: Any = None, **kwargs: Any) -> fi.Extracted:
    return fi.extract(
        model or net(),
        loader(Rows() if data is None else data),
        progress=False,
        store=store,
        **kwargs,
    )


def assert_same(a: fi.Extracted, b: fi.Extracted) -> None:
    for name in fi.Extracted._fields:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        assert x is None or (x.dtype == y.dtype and torch.equal(x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_gives_what_memory_gives(tmp_path: Path, dtype: torch.dtype) -> None:
    data = TensorDataset(X.to(dtype), LABELS)
    got = extract(tmp_path / "a", data, net(dtype), layer="penultimate")
    assert_same(got, extract(None, data, net(dtype), layer="penultimate"))
    assert_same(fi.open_store(tmp_path / "a"), got)
    files = {p.name for p in (tmp_path / "a").iterdir()}
    assert files == {"manifest.json", "logits.npy", "features.npy", "labels.npy"}
    kept = np.load(tmp_path / "a" / "logits.npy")  # any reader of .npy can
    assert kept.shape == (N, Y)
    assert kept.dtype == (np.uint16 if dtype == torch.bfloat16 else got.logits.numpy().dtype)


def test_without_labels_or_features(tmp_path: Path) -> None:
    got = extract(tmp_path / "a", TensorDataset(X))
    assert got.features is None
    assert got.labels is None


def test_a_complete_store_is_opened_without_the_model(tmp_path: Path) -> None:
    first = extract(tmp_path)
    model, data = net(), Rows()
    model.register_forward_hook(lambda *_: pytest.fail("the model was run"))
    assert_same(extract(tmp_path, data, model), first)
    assert max(data.loaded) < 10  # of the data, the first batch


@pytest.mark.parametrize("iterable", [False, True])
@pytest.mark.parametrize("batches", [0, 1, 5, 8])
def test_goes_on_after_an_interruption(tmp_path: Path, batches: int, iterable: bool) -> None:
    kind = Stream if iterable else Rows
    stop = 10 * batches + 5 if batches else 10
    if batches == 0:  # in the model, before any row is in
        broken = net()
        handle = broken.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            extract(tmp_path, kind(), broken, layer="penultimate")
        handle.remove()
    else:
        with pytest.raises(KeyboardInterrupt):
            extract(tmp_path, kind(stop), layer="penultimate")
    with pytest.raises(ValueError, match=rf"has {10 * batches} rows and is not complete"):
        fi.open_store(tmp_path)
    data = kind()
    got = extract(tmp_path, data, layer="penultimate")
    assert_same(got, extract(None, layer="penultimate"))
    if not iterable:
        assert data.loaded == [*range(10), *range(10 * batches, N)]  # type: ignore[union-attr]


SLOW = """
    import sys, time
    sys.path.insert(0, {here!r})
    import fastif_ext as fi
    from fastif_ext import saving
    from test_store import extract, net
    saving.SAVE_EVERY, saving.SHARE = 0.0, 1e9  # all it does is to save
    model = net()
    model.register_forward_hook(lambda *_: time.sleep(0.05))
    print("ready", flush=True)
    extract({folder!r}, None, model)
"""


def test_kill_in_the_middle(tmp_path: Path) -> None:
    code = textwrap.dedent(SLOW.format(here=str(Path(__file__).parent), folder=str(tmp_path)))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.25)
        os.kill(process.pid, signal.SIGKILL)
    rows = json.loads((tmp_path / "manifest.json").read_text())["rows"]
    assert 0 < rows < N
    with (tmp_path / "logits.npy").open("ab") as file:  # as if killed behind the last counted row
        file.write(b"half a row and far more than this store will ever hold" * 99)
    assert_same(extract(tmp_path), extract(None))


class TestRefused:
    def test_another_model_layer_or_data(self, tmp_path: Path) -> None:
        extract(tmp_path)
        other = net()
        other[0].weight.data[0, 0] += 1e-6
        with pytest.raises(ValueError, match=r"the store in .* does not match: model is"):
            extract(tmp_path, None, other)
        with pytest.raises(ValueError, match="layer is None there and 'penultimate' here"):
            extract(tmp_path, layer="penultimate")
        with pytest.raises(ValueError, match="data: rows is 90 there and 80 here"):
            extract(tmp_path, TensorDataset(X[:80], LABELS[:80]))
        with pytest.raises(ValueError, match="data: first batch is"):
            extract(tmp_path, TensorDataset(X.flip(0), LABELS))

    def test_a_folder_of_other_files(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("all of it")
        with pytest.raises(ValueError, match="has files that are not a store's"):
            extract(tmp_path)
        with pytest.raises(ValueError, match="is not a store of fastif_ext"):
            fi.open_store(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]

    def test_damaged(self, tmp_path: Path) -> None:
        extract(tmp_path)
        logits = tmp_path / "logits.npy"
        whole = logits.read_bytes()
        logits.write_bytes(whole[:-4])
        with pytest.raises(ValueError, match=r"is damaged: "):
            fi.open_store(tmp_path)
        np.save(logits, np.zeros((N, Y + 1), dtype=np.float32))
        with pytest.raises(ValueError, match=r"logits.npy holds float32 \[90, 4\], the manifest"):
            fi.open_store(tmp_path)
        logits.unlink()
        with pytest.raises(ValueError, match="is damaged: .*logits.npy"):
            fi.open_store(tmp_path)

    def test_another_format(self, tmp_path: Path) -> None:
        extract(tmp_path)
        path = tmp_path / "manifest.json"
        path.write_text(path.read_text().replace("store 1", "store 9"))
        with pytest.raises(ValueError, match="format 'fastif_ext store 9'"):
            fi.open_store(tmp_path)

    def test_batches_of_another_kind(self, tmp_path: Path) -> None:
        class Narrowing(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x[:, : 2 if x[0, 0] == X[10, 0] else 3]

        with pytest.raises(ValueError, match="the batch at row 10 has"):
            extract(tmp_path, None, Narrowing())

    def test_no_rows(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="gave no batch"):
            extract(tmp_path, TensorDataset(X[:0], LABELS[:0]))


def test_feature_sampler_over_a_store(tmp_path: Path) -> None:
    draw: Any = lambda data, **kwargs: fi.FeatureSampler.from_loader(  # noqa: E731
        net(), loader(data), 12, progress=False, **kwargs
    )
    whole = draw(Rows())
    with pytest.raises(KeyboardInterrupt):
        draw(Rows(50), store=tmp_path / "s")
    stored = draw(Rows(), store=tmp_path / "s")
    assert torch.equal(stored.indices, whole.indices)
    with pytest.raises(ValueError, match="state or store, not both"):
        draw(Rows(), store=tmp_path / "s", state=tmp_path / "t")


def test_samplers_draw_from_mapped_logits(tmp_path: Path) -> None:
    mapped, held = extract(tmp_path), extract(None)
    for draw in (
        lambda e: fi.CurvatureSampler(e.logits, 20, method="systematic"),
        lambda e: fi.LogitSampler(e.logits, 5),
        lambda e: fi.ResidualSampler(e.logits, e.labels, 20),
    ):
        assert torch.equal(draw(mapped).indices, draw(held).indices)  # type: ignore[no-untyped-call]
