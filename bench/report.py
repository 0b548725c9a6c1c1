"""Turn pytest-benchmark's JSON into a table of medians and ratios, and a compact JSON to keep.

python bench/report.py build/bench/cpu.json bench/results/cpu.json
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

OURS = "fastif_ext"


def commit() -> str:
    """The commit that was measured."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def compact(raw: dict[str, Any]) -> dict[str, Any]:
    """Medians and spreads by group and implementation, in milliseconds."""
    groups: dict[str, dict[str, Any]] = {}
    for run in raw["benchmarks"]:
        stats = {k: round(1e3 * run["stats"][k], 4) for k in ("median", "iqr", "min")}
        groups.setdefault(run["group"], {})[run["params"]["name"]] = stats
    cpu = raw["machine_info"]["cpu"]
    extra = raw["benchmarks"][0]["extra_info"]
    return {
        "date": raw["datetime"][:19],
        "commit": commit(),
        "cpu": cpu.get("brand_raw", platform.machine()),
        "avx512": "avx512f" in cpu.get("flags", []),
        "threads": extra["threads"],
        "torch": extra["torch"],
        "milliseconds": groups,
    }


def table(result: dict[str, Any]) -> str:
    """A markdown table: our median, and how many times longer the others take."""
    lines = ["| case | fastif_ext, ms | others, as a multiple of ours |", "|---|---|---|"]
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
            lines.append(f"| {group}{suffix} | {stats['median']:.2f} | {', '.join(others)} |")
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
