"""Write bench/results/performance.md and its plots from the JSON files of the benchmarks.

    python bench/performance.py                            # from and to bench/results
    python bench/performance.py build/bench/results        # another folder

Every figure on the page comes from a file beside it; what was tried and did not pay is told in
bench/tried.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from report import OURS, number, table

HERE = Path(__file__).resolve().parent
Result = dict[str, Any]

HEAD = """# Performance

How fast each step is, against what one would use instead and against what the machine can do at
all. Made by `bench/performance.py` from the JSON files beside it.

- All implementations of a job get the same data and take turns, in {rounds} rounds
  (`bench/rounds.py`); times are medians. A ratio above 1x means that fastif_ext is faster.
- The floor is the least time in which the job's bytes cross memory (inputs read once, outputs
  written once) and its arithmetic is done, whichever is longer, at the rates of a large copy and a
  large matrix product on this machine (`bench/floors.py`). What fits into a cache can be faster.
- Extra memory is the peak above what was resident before the call, its result included.
- The error is, of k-means' assignment: the share of rows given to a centroid that is not the
  nearest one; of its fit: inertia above that of the centres the data were drawn around; of products
  and scores: relative, against float64; of solvers: the true residual of the worst right-hand side,
  which is to be 1e-3; of class removal: 1 - F1 on the test set.
"""


def load(folder: Path, name: str) -> Result | None:
    path = folder / name
    return json.loads(path.read_text()) if path.is_file() else None


def machine(result: Result) -> str:
    """One line on where and when."""
    rates = ", ".join(f"{k} {v:g} TFLOP/s" for k, v in result["tflops"].items())
    kind = result["cpu"] + (" (AVX-512)" if result["avx512"] else "")
    return (
        f"{kind if result['device'] == 'cpu' else result['device']}, "
        f"{result['threads']} thread(s), torch {result['torch']}, commit {result['commit']}, "
        f"{result['date'][:10]}; copy "
        f"{result['copy_gb_per_second']:g} GB/s, {rates}."
    )


def everything(result: Result) -> str:
    """A row for every implementation of every job."""
    lines = [
        "| case | implementation | ms | IQR | rounds | multiple of ours | % of floor | extra MB "
        "| error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for group, runs in result["milliseconds"].items():
        own = runs.get(OURS, {}).get("median")
        for name, s in runs.items():
            cells = [
                group,
                name,
                number(s["median"]),
                number(s["iqr"]),
                str(s["rounds"]),
                "" if own is None or name == OURS else f"{s['median'] / own:.2f}",
                f"{100 * s['floor'] / s['median']:.0f}" if "floor" in s else "",
                f"{s['extra_mb']:.1f}" if "extra_mb" in s else "",
                f"{s['error']:.1e}" if "error" in s else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def threads(one: Result, two: Result) -> str:
    """Speed-up of our median."""
    lines = ["| case | 1 thread, ms | 2 threads, ms | speed-up |", "|---|---|---|---|"]
    for group, runs in one["milliseconds"].items():
        other = two["milliseconds"].get(group, {})
        if OURS in runs and OURS in other:
            a, b = runs[OURS]["median"], other[OURS]["median"]
            lines.append(f"| {group} | {number(a)} | {number(b)} | {a / b:.2f}x |")
    return "\n".join(lines)


def growth(result: Result) -> str:
    """Slopes of the curves in scaling.png."""
    lines = ["| operator | size | from | to | slope |", "|---|---|---|---|---|"]
    for c in result["curves"]:
        lines.append(
            f"| {c['operator']} | {c['size']} | {c['sizes'][0]:,} | {c['sizes'][-1]:,} "
            f"| {c['slope']:.2f} |"
        )
    return "\n".join(lines)


def plot(result: Result, path: Path) -> None:
    """The best of the others, as a multiple of our time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars = []
    for group, runs in result["milliseconds"].items():
        others = {k: v["median"] for k, v in runs.items() if not k.startswith(OURS)}
        if OURS in runs and others:
            best = min(others, key=others.__getitem__)
            bars.append((f"{group}  vs {best}", others[best] / runs[OURS]["median"]))
    figure, axis = plt.subplots(figsize=(11, 0.24 * len(bars) + 1))
    names, ratios = zip(*reversed(bars), strict=True)
    axis.barh(names, ratios, color=["#2b7bba" if r >= 1 else "#c44e52" for r in ratios])
    axis.axvline(1, color="black", lw=0.8)
    axis.set(xscale="log", xlabel="time of the best of the others / time of fastif_ext")
    axis.tick_params(axis="y", labelsize=7)
    axis.grid(alpha=0.3, axis="x", which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def page(folder: Path) -> str:
    """The page, from what there is."""
    one, two = load(folder, "cpu-1-thread.json"), load(folder, "cpu-2-threads.json")
    if one is None:
        raise SystemExit(f"{folder / 'cpu-1-thread.json'} is not there; `make bench` makes it")
    counts = [s["rounds"] for runs in one["milliseconds"].values() for s in runs.values()]
    plot(one, folder / "performance.png")
    parts = [
        HEAD.format(rounds=f"{min(counts)} to {max(counts)}"),
        f"## One thread\n\n`make bench`: {machine(one)}\n\n{table(one['milliseconds'])}\n\n"
        "![The best of the others](performance.png)",
    ]
    if two is not None:
        parts.append(
            f'## Two threads\n\n`make bench ARGS="--threads 2"`: {machine(two)}\n\n'
            f"{threads(one, two)}"
        )
    for path in sorted(folder.glob("cpu-1-thread-*.json")):
        other = json.loads(path.read_text())
        parts.append(
            f"## Another machine, one thread\n\n{machine(other)}\n\n{table(other['milliseconds'])}"
        )
    for path in sorted(folder.glob("*.json")):
        gpu = json.loads(path.read_text())
        if "clocks" in gpu:
            parts.append(
                f"## {gpu['device']}\n\n`make gpu`: {machine(gpu)} Clocks and limits: "
                f"{gpu['clocks']}.\n\n{table(gpu['milliseconds'])}\n\n{everything(gpu)}"
            )
    scaling = load(folder, "scaling.json")
    if scaling is not None:
        parts.append(
            "## How the cost grows\n\n`python bench/scaling.py`, commit "
            f"{scaling['commit']}: one size at a time is doubled; the slope of time against size "
            "on logarithmic axes, over the upper half of the range. 1 is proportional, below 1 a "
            f"fixed cost is still being shared.\n\n{growth(scaling)}\n\n"
            "![Time against size](scaling.png)"
        )
    tried = HERE / "tried.md"
    if tried.is_file():
        parts.append(tried.read_text().strip())
    parts.append(f"## Everything that was measured\n\n{everything(one)}")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results"
    target = folder / "performance.md"
    target.write_text(page(folder))
    print(f"written: {target}")


if __name__ == "__main__":
    main()
