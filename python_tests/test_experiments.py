"""The experiments at tiny size: they run, go on where they were stopped, and fill the page."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "bench" / "experiments"
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not FOLDER.is_dir(), reason="bench/ is not here: no source tree"),
]


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict:
    module: ModuleType = importlib.import_module(name)
    where = ["--work", str(folder / "work"), "--output", str(folder)]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *where, *options])
    module.main()
    return json.loads((folder / f"{name}-digits.json").read_text())


@pytest.mark.usefixtures("experiments")
def test_they_run_resume_and_fill_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ["--sizes", "60", "--seeds", "1"]
    got = run("samplers", tmp_path, monkeypatch, *tiny, "--samplers", "random", "curvature")
    log = tmp_path / "work" / "samplers-digits.jsonl"
    assert len(got["records"]) == 5
    assert len(log.read_text().splitlines()) == 5

    # a run that was killed while it wrote: that line is made again, the others are kept
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    stamp = json.loads(lines[0])["result"]
    again = run("samplers", tmp_path, monkeypatch, *tiny, "--samplers", "random", "curvature")
    assert [r["method"] for r in again["records"]] == [r["method"] for r in got["records"]]
    assert again["records"][0]["solve_seconds"] == pytest.approx(stamp["solve_seconds"], rel=1e-5)

    for name in ("variants", "lissa", "removal_set", "large_steps"):
        found = run(name, tmp_path, monkeypatch, *tiny, "--first", "7")
        assert 3 <= len(found["records"]) <= 7, name

    page = importlib.import_module("page")
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.main()
    text = (tmp_path / "page.md").read_text()
    for heading in ("Samplers", "Variants", "LiSSA", "sampling the removal set", "large updates"):
        assert heading in text
    assert "### digits" in text
    assert (tmp_path / "samplers-digits.png").is_file()
    assert "nan" not in text


def test_the_committed_page_is_made_from_the_committed_results() -> None:
    results = FOLDER.parent / "results"
    text = (results / "experiments.md").read_text()
    for path in (results / "experiments").glob("*.json"):
        facts = json.loads(path.read_text())
        assert facts["records"], path
        assert path.stem.split("-")[0] + ".py" in text, path
