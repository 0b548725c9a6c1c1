"""Turn pytest-benchmark's JSON into a compact JSON to keep, and print its table.

python bench/report.py build/bench/cpu.json bench/results/cpu-1-thread.json

Several files are merged in their order, a later one's groups replacing an earlier one's; those
that were kept before may be among them, and COMMIT then says which commit made what:

COMMIT="1234567 (scores: 89abcde)" python bench/report.py \
    bench/results/cpu-1-thread.json scores.json bench/results/cpu-1-thread.json
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

OURS = "fastif_ext"


def commit() -> str:
    """The commit that was measured; COMMIT names it where the history does not."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the GPU's clocks and driver."""
    fields = ["clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "driver_version"]
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    found = done.stdout.strip().splitlines()[0].split(", ")
    return dict(zip(fields, found, strict=True))


def compact(raw: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds, floors, memory and errors by group and implementation."""
    groups: dict[str, dict[str, Any]] = {}
    for run in raw["benchmarks"]:
        stats = {k: round(1e3 * run["stats"][k], 5) for k in ("median", "iqr", "min")}
        extra = run["extra_info"]
        stats["rounds"] = run["stats"]["rounds"]
        if extra["floor_seconds"] is not None:
            stats["floor"] = round(1e3 * extra["floor_seconds"], 5)
        if extra["extra_bytes"] is not None:
            stats["extra_mb"] = round(extra["extra_bytes"] / 1e6, 2)
        if extra["error"] is not None:
            stats["error"] = float(f"{extra['error']:.3g}")
        groups.setdefault(run["group"], {})[run["params"]["name"]] = stats
    cpu = raw["machine_info"]["cpu"]
    extra = raw["benchmarks"][0]["extra_info"]
    return {
        "date": raw["datetime"][:19],
        "commit": commit(),
        "device": extra["device"],
        **({"clocks": clocks()} if extra["device"] != "cpu" else {}),
        "cpu": cpu.get("brand_raw", platform.machine()),
        "avx512": "avx512f" in cpu.get("flags", []),
        "threads": extra["threads"],
        "torch": extra["torch"],
        "copy_gb_per_second": round(extra["copy_bytes_per_second"] / 1e9, 1),
        "tflops": {k: round(v / 1e12, 3) for k, v in extra["flops_per_second"].items()},
        "milliseconds": groups,
    }


def table(groups: dict[str, Any]) -> str:
    """A markdown table: our median, its share of the floor, and what the others take."""
    lines = [
        "| case | fastif_ext, ms | % of floor | others, as a multiple of ours |",
        "|---|---|---|---|",
    ]
    for group, runs in groups.items():
        if OURS not in runs:
            continue
        own = runs[OURS]
        others = [
            f"{name.removeprefix(f'{OURS}, ')} {stats['median'] / own['median']:.1f}x"
            for name, stats in runs.items()
            if name != OURS
        ]
        share = f"{100 * own['floor'] / own['median']:.0f}" if "floor" in own else ""
        lines.append(f"| {group} | {number(own['median'])} | {share} | {', '.join(others)} |")
    return "\n".join(lines)


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def main() -> None:
    """Read, merge, write and print."""
    *sources, target = map(Path, sys.argv[1:])
    result: dict[str, Any] = {}
    for source in sources:
        read = json.loads(source.read_text())
        new = compact(read) if "benchmarks" in read else {**read, "commit": commit()}
        result = {**new, "milliseconds": {**result.get("milliseconds", {}), **new["milliseconds"]}}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result["milliseconds"]))


if __name__ == "__main__":
    main()
