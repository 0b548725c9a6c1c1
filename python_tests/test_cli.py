"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastif_ext.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_demo_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    arguments = ["demo", "--output", str(out), "--samples", "50", "100", "--seeds", "2", "--quiet"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for method in ("retraining", "exact influence", "gradient only", "stratified", "curvature"):
        assert method in printed
    facts = json.loads((out / "demo.json").read_text())
    assert facts["seeds"] == 2
    assert len(facts["records"]) == 3 + 7 * 2 * 2
    done = [r for r in facts["records"] if r["failure"] is None]
    assert all(0 <= r["f1"] <= 1 for r in done)
    assert all(r["hvp_error"] > 0 and r["iterations"] > 0 for r in done if r["m"])
    assert (out / "demo.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(out.glob("*.part"))


def test_remove_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, report = tmp_path / "edited.pt", tmp_path / "report.json"
    removal = "remove-class --data digits --class 5 --sampler curvature --samples 200 --quiet"
    code = main([*removal.split(), "--save", str(weights), "--json", str(report)])
    assert code == 0
    printed = capsys.readouterr().out
    assert "Forgot class 5" in printed
    figures = json.loads(report.read_text())
    assert figures["after"]["self_accuracy"] < 0.1
    assert figures["after"]["f1"] > 0.9
    assert figures["residual"] <= 1e-3
    state = torch.load(weights, weights_only=True)
    # the edited weights can be loaded again, and the class is still forgotten
    assert main(
        ["remove-class", "--data", "digits", "--class", "6", "--quiet", "--weights", str(weights)]
    ) in (0, 1)
    assert all(t.dtype == torch.float64 for t in state.values())


def test_diagnose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    command = "diagnose --data digits --class 3 --samples 200 --seeds 2 --quiet"
    assert main([*command.split(), "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "Diagnosis of influence with CurvatureSampler(200 of 1347 rows)" in printed
    found = json.loads(path.read_text())["findings"]
    assert [f["name"] for f in found if f["applies"]] == [
        line.split("] ")[1].split(":")[0] for line in printed.splitlines() if "[!!]" in line
    ]
    assert len(found) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("remove-class --data digits --class 12 --quiet", "--class must be between 0 and 9"),
        ("remove-class --data mnist:/nowhere --class 1 --quiet", "/nowhere"),
        ("remove-class --data imagenet --class 1 --quiet", "imagenet"),
        ("remove-class --data digits --class 1 --samples 99999 --quiet", "99999"),
        ("diagnose --data digits --class 1 --seeds 1 --quiet", "seeds must be at least 2"),
        ("demo --class 11 --quiet --output {tmp}", "digit from 0 to 9"),
    ],
)
def test_bad_input_is_one_line(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.format(tmp=tmp_path).split()) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("fastif-ext: ")
    assert "\n" not in error


def test_module_and_info() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastif_ext", "info"], capture_output=True, text=True, check=True
    )
    assert "cuda: False" in done.stdout
    assert f"torch: {torch.__version__}" in done.stdout


def test_bad_option_exits_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["remove-class", "--data", "digits", "--class", "1", "--damping", "much"])
    assert stop.value.code == 2
    assert "must be a number or 'auto', got 'much'" in capsys.readouterr().err
