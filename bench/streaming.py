"""Peak memory and time of streaming samplers against the number of rows.

    python streaming.py     # about two minutes; writes results/streaming.json and .png

A linear model gives logits of 100 classes; batches of 10,000 rows come from one tensor, so that
what is measured is the pass and not the data. Beside the streams: the same logits kept in memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import fastif_ext as fi
from fastif_ext import blocks
from fastif_ext.memory import peak_memory

BATCH, INPUTS, CLASSES = 10_000, 32, 100
SIZES = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
RESULTS = Path(__file__).resolve().parent / "results"
LABELS = {
    "logit": "logit sampler, stream: keeps k Y rows",
    "curvature": "curvature sampler, stream: keeps 4 bytes a row",
    "curvature-systematic": "systematic curvature sampler, stream: keeps 20 bytes a row",
    "k-means": "k-means over chunks: keeps 24 bytes a row, and a block",
    "in memory": "logit sampler on all logits: keeps 400 bytes a row",
}


class Rows(IterableDataset[Tensor]):
    """Batches of rows, and the chunks that k-means reads."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.batch = torch.randn(BATCH, INPUTS, generator=torch.Generator().manual_seed(0))

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(0, self.rows, BATCH):
            yield self.batch


def cases(model: torch.nn.Module, rows: int) -> dict[str, Callable[[], Any]]:
    data = Rows(rows)
    loader: Any = DataLoader(data, batch_size=None)
    options: dict[str, Any] = {"seed": 0, "progress": False}

    def in_memory() -> None:
        logits = fi.extract(model, loader, progress=False).logits
        fi.LogitSampler(logits, 10, seed=0)

    found: dict[str, Callable[[], Any]] = {
        "logit": lambda: fi.LogitSampler.from_loader(model, loader, 10, **options),
        "curvature": lambda: fi.CurvatureSampler.from_loader(model, loader, 1000, **options),
        "curvature-systematic": lambda: fi.CurvatureSampler.from_loader(
            model, loader, 1000, method="systematic", **options
        ),
        "k-means": lambda: fi.KMeans(10, seed=0, max_iter=3, tol=0).fit(data),
    }
    if rows * CLASSES * 4 < 1.5e9:
        found["in memory"] = in_memory
    return found


def plot(records: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), constrained_layout=True)
    for case, label in LABELS.items():
        mine = [r for r in records if r["case"] == case]
        n = [r["rows"] for r in mine]
        axes[0].plot(n, [r["peak_megabytes"] for r in mine], "o-", label=label)
        axes[1].plot(n, [r["seconds"] for r in mine], "o-")
    for axis, what in zip(axes, ("peak memory above the start, MB", "seconds"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="rows", ylabel=what)
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    blocks.BLOCK = 2**22  # 16 MB, so that what grows with the rows can be seen
    model = torch.nn.Linear(INPUTS, CLASSES)
    for work in cases(model, BATCH).values():
        work()  # what is loaded once, at the first call
    records = []
    for rows in arguments.sizes:
        for case, work in cases(model, rows).items():
            begin = time.perf_counter()
            with peak_memory() as peak:
                work()
            seconds = time.perf_counter() - begin
            records.append(
                {
                    "case": case,
                    "rows": rows,
                    "peak_megabytes": round(peak.megabytes or 0.0, 1),
                    "seconds": round(seconds, 3),
                }
            )
            print(
                f"{case:22} {rows:11,} rows {peak.megabytes:8.1f} MB {seconds:8.2f} s", flush=True
            )
    payload = {
        "command": "python bench/streaming.py",
        "classes": CLASSES,
        "inputs": INPUTS,
        "batch": BATCH,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "build": fi.build_info(),
        "records": records,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "streaming.json").write_text(json.dumps(payload, indent=1) + "\n")
    plot(records, arguments.output / "streaming.png")


if __name__ == "__main__":
    main()
