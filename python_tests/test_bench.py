"""Every benchmark once at tiny size: what it compares still runs and still agrees."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"

PRODUCTS = ("softmax_hvp", "linear_softmax_hvp", "GaussNewton")

pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="bench/ is not here: no source tree")


def run(*arguments: str | Path, cwd: Path) -> None:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the benchmarks' files; not timed in earnest."""
    folder = tmp_path_factory.mktemp("bench")
    run(
        "-m", "pytest", BENCH, "-c", ROOT / "pyproject.toml", "-o", "python_files=bench_*.py", "-q",
        "--scale", "0.005", "--seconds", "0", "--benchmark-json", folder / "raw.json",
        "-k", "not compile and not 1000000 and not 200000 and not 60000 and not 50000",
        cwd=folder,
    )  # fmt: skip
    run(BENCH / "report.py", folder / "raw.json", folder / "cpu-1-thread.json", cwd=folder)
    return folder


def groups(results: Path) -> dict[str, dict[str, Any]]:
    return json.loads((results / "cpu-1-thread.json").read_text())["milliseconds"]


def test_every_family_ran(results: Path) -> None:
    found = {group.split(" ")[0].rstrip(",") for group in groups(results)}
    assert found >= {
        "class_multinomial", "curvature_multinomial", "kmeans_assign", "kmeans_update",
        "KMeans.fit", "lissa_update_", "softmax_hvp", "linear_softmax_hvp", "scores", "iHVP",
        "GaussNewton",
    }  # fmt: skip
    for group, runs in groups(results).items():
        assert "fastif_ext" in runs, group
        assert all(run["median"] > 0 and run["rounds"] >= 1 for run in runs.values()), group


def test_what_is_compared_agrees(results: Path) -> None:
    """Everybody does the same job: a baseline that computes something else would win easily."""
    for group, runs in groups(results).items():
        errors = {name: run["error"] for name, run in runs.items() if "error" in run}
        if group.startswith((*PRODUCTS, "scores", "kmeans_update")):
            assert max(errors.values()) < 1e-4, (group, errors)
        if group.startswith("kmeans_assign n"):
            assert errors["fastif_ext"] == 0, (group, errors)
        if group.startswith("iHVP"):
            assert max(errors.values()) <= 1.5e-3, (group, errors)


def test_the_page(results: Path) -> None:
    run(BENCH / "performance.py", results, cwd=results)
    text = (results / "performance.md").read_text()
    for group in groups(results):
        assert f"| {group} |" in text
    assert (results / "performance.png").stat().st_size > 1000


def test_the_committed_page_is_that_of_the_committed_files() -> None:
    committed = BENCH / "results"
    text = (committed / "performance.md").read_text()
    assert import_module("performance").page(committed) == text


def test_the_curves(tmp_path: Path) -> None:
    """The slopes of made-up curves; one real sweep of small sizes."""
    scaling = import_module("scaling")
    sizes = [1, 2, 4, 8, 16, 32]
    assert scaling.slope(sizes, [3.0 * s for s in sizes]) == pytest.approx(1)
    assert scaling.slope(sizes, [5 + 0.0 * s for s in sizes]) == pytest.approx(0)
    seconds = scaling.sweep(lambda n: scaling.softmax_hvp(n=n), [50, 100], 0.0)
    assert len(seconds) == 2
    assert min(seconds) > 0
    curve = {"operator": "softmax_hvp", "size": "n", "sizes": [50, 100], "seconds": seconds}
    scaling.plot([{**curve, "slope": 1.0}], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
