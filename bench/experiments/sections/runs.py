"""What all sections say and ask of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Results = dict[str, Any]
"""What `common.save` wrote, and "path", where."""
WITHIN = 0.005  # F1 counts as equal to exact influence's when it is not further below


def conditions(r: Results, experiment: str) -> str:
    """One line on what was run where."""
    name = r["path"].stem.removeprefix(f"{experiment}-").partition("-damping-")[0]
    whole = " --whole" if name.endswith("-whole") else ""
    setting = name.removesuffix("-whole")
    damping = f" --damping {r['damping']:g}" if experiment == "samplers" and r["damping"] else ""
    size = f"{r['train_rows']:,} training rows, {r['parameters']:,} parameters moved"
    return (
        f"`python bench/experiments/{experiment}.py --setting {setting}{whole}{damping}`: {size}, "
        f"class {r['class_index']} ({r['class']}) removed, model's test accuracy "
        f"{r['test_accuracy']:.3f}; {r['seeds']} seeds; torch {r['torch']}, {r['device']}, "
        f"{r['threads']} thread(s), {r['build']['cpu']}, {r['date'][:10]}."
    )


def methods(records: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["method"] for r in records if r.get("m") is not None))


def sizes(records: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({r["m"] for r in records if r.get("m") is not None})


def is_run(record: dict[str, Any], name: str, m: int) -> bool:
    return record["method"] == name and record.get("m") == m
