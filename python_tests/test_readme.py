"""The README's example runs as it stands."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastif_ext as fi
from fastif_ext import datasets, models
from fastif_ext.training import train_lbfgs

README = Path(__file__).parent.parent / "README.md"

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = blocks()[0]
    data = datasets.load("digits")
    model = models.build("mlp", dtype=torch.float64)
    train_lbfgs(model, *data.train.tensors, l2=1e-3)
    monkeypatch.chdir(tmp_path)
    names = {"model": model, "train": data.train, "test": data.test}
    exec(compile(code, "README.md", "exec"), names)
    assert "F1" in capsys.readouterr().out
    assert (tmp_path / "forgot_3.pt").exists()
    rows = torch.cat([labels for _, labels in names["subset"]])
    assert len(rows) == 400
    assert names["scores"].shape == (20, 1347)
    loader = names["loader"]

    exec(compile(blocks()[1], "README.md", "exec"), names)
    whole = fi.extract(model, loader, layer="penultimate", progress=False)
    assert torch.equal(names["sampler"].indices, fi.LogitSampler(whole.logits, 40).indices)
    centers = fi.KMeans(10, seed=0).fit(whole.features).cluster_centers_
    assert torch.equal(names["kmeans"].cluster_centers_, centers)

    one = dist.HashStore()
    monkeypatch.setattr(
        dist,
        "init_process_group",
        partial(dist.init_process_group, store=one, rank=0, world_size=1),
    )
    try:
        exec(compile(blocks()[2], "README.md", "exec"), names)
    finally:
        dist.destroy_process_group()
    assert names["scores"].shape == (20, 1347)
    assert names["report"].f1 > 0.9


@pytest.mark.filterwarnings("ignore::Warning")  # theirs
def test_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """captum's and pyDVL's scores on the weighted rows are those of dense algebra."""
    needs = "pip install captum 'pydvl[influence]'"
    pytest.importorskip("captum", reason=needs)
    pytest.importorskip("pydvl.influence.torch", reason=needs)
    monkeypatch.syspath_prepend(str(README.parent / "bench"))
    names: dict[str, Any] = {}
    code = blocks()[-1]
    exec(compile(code, "README.md", "exec"), names)
    lib = sys.modules["with_libraries"]
    want = lib.exact_scores(
        lib.Problem(*(names[k] for k in ("model", "train", "test"))), names["sampler"]
    )
    torch.testing.assert_close(names["by_captum"], want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(names["by_pydvl"], want, rtol=1e-3, atol=1e-4)


def test_public_names_in_the_readme_exist() -> None:
    table = README.read_text().split("## What is in it")[1].split("\n## ")[0]
    for name in re.findall(r"`([a-zA-Z_]+)`", table):
        if name not in ("from_loader", "csrc", "opcheck", "python_tests", "bench"):
            assert hasattr(fi, name), f"README names fastif_ext.{name}"


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README.read_text()):
        assert re.search(rf"^{target}:", makefile, re.M), f"README names make {target}"
