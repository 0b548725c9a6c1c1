"""--device, where it can be given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastif_ext.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


def remove(place: str, folder: Path) -> dict[str, float]:
    command = f"remove-class --data digits --class 5 --samples 200 --quiet --device {place}"
    report, weights = folder / f"{place}.json", folder / f"{place}.pt"
    assert main([*command.split(), "--json", str(report), "--save", str(weights)]) == 0
    assert all(t.dtype == torch.float64 for t in torch.load(weights, map_location="cpu").values())
    return json.loads(report.read_text())


def test_remove_class(
    device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = remove(device.type, tmp_path)
    assert figures["after"]["f1"] > 0.9
    assert figures["peak_of"] == device.type
    assert f"rows of digits on {device}" in capsys.readouterr().out
    # edited weights are read on any device
    command = f"diagnose --data digits --class 3 --seeds 2 --quiet --device {device}"
    assert main([*command.split(), "--weights", str(tmp_path / f"{device}.pt")]) == 0


@pytest.mark.gpu
def test_demo_on_a_gpu(gpu: str, tmp_path: Path) -> None:
    command = "demo --samples 50 --seeds 1 --samplers random curvature --quiet --device cuda"
    assert main([*command.split(), "--output", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / "demo.json").read_text())
    assert facts["device"] == "cuda"
    assert all(r["failure"] is None for r in facts["records"])


@pytest.mark.parametrize(
    "command", ["remove-class --data digits --class 1", "diagnose --data digits --class 1", "demo"]
)
def test_a_gpu_that_is_not_there(
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), "--device", "cuda", "--quiet"]) == 2
    assert "device 'cuda' cannot be used: torch finds no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command.split(), "--device", "tpu"])
