"""Tables, plots and JSON of a sampler comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastif_ext.comparison import Record


class Interval(NamedTuple):
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % bootstrap interval (2000 resamples, fixed seed) of some values.

    Example:
        >>> from fastif_ext.report import interval
        >>> interval([0.5, 0.5, 0.5])
        Interval(mean=0.5, low=0.5, high=0.5)
    """
    if not values:
        raise ValueError("interval: values is empty")
    x = np.asarray(values, dtype=np.float64)
    resampled = np.random.default_rng(0).choice(x, (2000, len(x))).mean(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(float(x.mean()), float(low), float(high))


COLUMNS = (
    # field, heading, format
    ("f1", "F1", "{:.3f}"),
    ("self_accuracy", "self acc.", "{:.3f}"),
    ("remaining_accuracy", "rem. acc.", "{:.3f}"),
    ("hvp_error", "error of H_S v", "{:.3f}"),
    ("ihvp_error", "error of iHVP", "{:.3f}"),
    ("damping", "damping", "{:.3f}"),
    ("iterations", "iterations", "{:.0f}"),
    ("solve_seconds", "time s", "{:.2f}"),
    ("peak_megabytes", "peak MB", "{:.1f}"),
)
WITH_INTERVAL = ("f1", "hvp_error", "ihvp_error")


def groups(records: Sequence[Record]) -> dict[tuple[str, int | None], list[Record]]:
    """The records by (method, m), in order of first appearance."""
    grouped: dict[tuple[str, int | None], list[Record]] = {}
    for record in records:
        grouped.setdefault((record.method, record.m), []).append(record)
    return grouped


def table(records: Sequence[Record]) -> str:
    """A markdown table, one row per method and subset size.

    F1 and the errors carry their 95 % bootstrap interval over seeds; other columns are means.
    Runs that failed are counted in the last column and left out of the means.
    """
    rows = [["method", "m", "runs", *(heading for _, heading, _ in COLUMNS), "failed"]]
    for (method, m), group in groups(records).items():
        done = [record for record in group if record.failure is None]
        cells = [method, "" if m is None else str(m), str(len(group))]
        for field, _, form in COLUMNS:
            values = [v for v in (getattr(record, field) for record in done) if v is not None]
            cells.append(_cell(field, values, form))
        rows.append([*cells, str(len(group) - len(done))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _cell(field: str, values: list[float], form: str) -> str:
    if not values:
        return ""
    if field in WITH_INTERVAL and len(values) > 1:
        mean, low, high = interval(values)
        return f"{form.format(mean)} [{form.format(low)}, {form.format(high)}]"
    return form.format(float(np.mean(values)))


def plot(records: Sequence[Record], path: Path, *, title: str) -> None:
    """Error of H_S v, error of the iHVP and F1 against subset size, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    grouped = groups(records)
    methods = list(dict.fromkeys(method for method, m in grouped if m is not None))
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), constrained_layout=True)
    panels = (
        ("hvp_error", "relative error of $H_S v$", True),
        ("ihvp_error", "relative error of $(H_S + \\lambda)^{-1} g$", True),
        ("f1", "F1 of class removal", False),
    )
    for axis, (field, label, log) in zip(axes, panels, strict=True):
        for i, method in enumerate(methods):
            points = []
            for (name, m), group in grouped.items():
                values = [v for r in group if (v := getattr(r, field)) is not None]
                if name == method and m is not None and values:
                    points.append((m, interval(values)))
            if not points:
                continue
            sizes = [m * (1 + 0.012 * (i - len(methods) / 2)) for m, _ in points]
            means = [x.mean for _, x in points]
            spans = [[x.mean - x.low for _, x in points], [x.high - x.mean for _, x in points]]
            axis.errorbar(sizes, means, spans, marker="o", ms=4, lw=1.4, capsize=2, label=method)
        if field == "f1":
            lines = [(n, g[0].f1) for (n, m), g in grouped.items() if m is None and g[0].f1]
            for i, (name, f1) in enumerate(lines):
                axis.axhline(f1, ls="--", lw=0.9, color="grey")
                axis.annotate(  # side by side: they may lie close together
                    name,
                    (0.02 + i / len(lines), f1),
                    xycoords=("axes fraction", "data"),
                    fontsize=8,
                    va="bottom",
                )
        axis.set(xscale="log", xlabel="subset size m", title=label)
        if log:
            axis.set_yscale("log")
        ticks = sorted({m for _, m in grouped if m is not None})
        axis.set_xticks(ticks, [str(m) for m in ticks])
        axis.xaxis.minorticks_off()
        if log:
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.yaxis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_json(path: Path, payload: dict[str, Any], records: Sequence[Record]) -> None:
    """The facts of a run and all its records, written whole or not at all."""
    text = json.dumps({**payload, "records": [asdict(r) for r in records]}, indent=1)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
