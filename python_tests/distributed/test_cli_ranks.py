"""The command line under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastif_ext as fi
from fastif_ext.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_remove_class_on_two_ranks(tmp_path: Path) -> None:
    """As by one process, printed and written once."""
    command = ["remove-class", "--data", "digits", "--class", "5", "--samples", "200"]
    command += ["--solver", "cg", "--quiet", "--json"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["-m", "fastif_ext"]
    done = subprocess.run(
        [sys.executable, *torchrun, *command, tmp_path / "two.json", "--save", tmp_path / "m.pt"],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(fi.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for line in ("Training mlp", "Forgot class 5", "two.json", "m.pt"):
        assert done.stdout.count(line) == 1
    assert main([*command, str(tmp_path / "one.json")]) == 0
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["after"] == pytest.approx(one["after"], rel=1e-3)
    assert two["step"] == pytest.approx(one["step"], rel=1e-3)
    assert len(torch.load(tmp_path / "m.pt", weights_only=True)) == 4


def test_other_commands_refuse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["info"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastif-ext, rank 1: only remove-class works under torchrun")
