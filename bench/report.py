"""Turn pytest-benchmark's JSON into a table of medians and ratios, and a compact JSON to keep.

python bench/report.py build/bench/cpu.json bench/results/cpu.json
python bench/report.py build/bench/cuda.json bench/results/h200.json

`% of floor` is the least time that the job's bytes and arithmetic need on this machine (floors.py),
as a share of our median.
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
    """The commit that was measured; COMMIT names it where the history is not at hand."""
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
    """Medians and spreads by group and implementation, in milliseconds."""
    groups: dict[str, dict[str, Any]] = {}
    for run in raw["benchmarks"]:
        stats = {k: round(1e3 * run["stats"][k], 5) for k in ("median", "iqr", "min")}
        extra = run["extra_info"]
        if "floor_seconds" in extra:
            stats["floor"] = round(1e3 * extra["floor_seconds"], 5)
        if "extra_bytes" in extra:
            stats["extra_mb"] = round(extra["extra_bytes"] / 1e6, 2)
        groups.setdefault(run["group"], {})[run["params"]["name"]] = stats
    cpu = raw["machine_info"]["cpu"]
    extra = raw["benchmarks"][0]["extra_info"]
    gpu = extra["device"] != "cpu"
    return {
        "date": raw["datetime"][:19],
        "commit": commit(),
        "device": extra["device"],
        **({"clocks": clocks()} if gpu else {}),
        "cpu": cpu.get("brand_raw", platform.machine()),
        "avx512": "avx512f" in cpu.get("flags", []),
        "threads": extra["threads"],
        "torch": extra["torch"],
        "copy_gb_per_second": round(extra["copy_bytes_per_second"] / 1e9, 1),
        "tflops": {k: round(v / 1e12, 3) for k, v in extra["flops_per_second"].items()},
        "milliseconds": groups,
    }


def table(result: dict[str, Any]) -> str:
    """A markdown table: our median, its share of the floor, and what the others take."""
    lines = [
        "| case | fastif_ext, ms | % of floor | others, as a multiple of ours |",
        "|---|---|---|---|",
    ]
    for group, runs in result["milliseconds"].items():
        for name, stats in runs.items():
            if not name.startswith(OURS):
                continue
            suffix = name.removeprefix(OURS)
            others = [
                f"{other.removesuffix(suffix)} {runs[other]['median'] / stats['median']:.1f}x"
                for other in runs
                if not other.startswith(OURS) and other.endswith(suffix)
                and ("replacement" in other) == ("replacement" in suffix)
            ]  # fmt: skip
            share = f"{100 * stats['floor'] / stats['median']:.0f}" if "floor" in stats else ""
            lines.append(
                f"| {group}{suffix} | {stats['median']:.3f} | {share} | {', '.join(others)} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Read, write and print."""
    source, target = map(Path, sys.argv[1:3])
    result = compact(json.loads(source.read_text()))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
