"""What a job will take: measured constants x a formula, checked against measurements.

    python bench/cost_model.py --output bench/results/cost-model     # writes .json and .md

The job is a pass of a model over n rows with curvature and logit sampling, and products with the
Gauss-Newton matrix on m of them. On the CPU the constants are measured at one size each, and the
formula is checked at three others. For a GPU they are derived from published roofs and said to be.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cost_formula import FORMULAS, Job, K, Machine, h100, large_jobs, predict
from torch import nn
from torch.utils.data import TensorDataset

import fastif_ext as fi
from fastif_ext.data import BATCH, loader, take
from fastif_ext.memory import PeakMemory, peak_memory
from fastif_ext.samplers import CurvatureFold, LogitFold
from fastif_ext.stream import stream


def network(width: int, hidden: int, classes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, classes))


def small_job(name: str, n: int, width: int, hidden: int, classes: int, m: int) -> Job:
    p = (width + 1) * hidden + (hidden + 1) * classes
    flops = 2.0 * (width * hidden + hidden * classes)
    # kept: inputs of both layers, the tangent's place, outputs, their softmax and z
    kept = width + 2 * hidden + 4 * classes
    return Job(name, n, classes, flops, 2 * hidden, m, flops, p, kept)


SIZES = {  # name: n, width, hidden, classes, m
    "small": (20_000, 64, 128, 10, 1_000),
    "middle": (60_000, 128, 256, 100, 3_000),
    "large": (60_000, 256, 512, 1_000, 3_000),
}


def measured(n: int, width: int, hidden: int, classes: int, m: int) -> dict[str, float]:
    """Seconds and bytes of a pass with both samplers, and of a product."""
    model = network(width, hidden, classes)
    data = TensorDataset(torch.randn(n, width), torch.randint(classes, (n,)))
    seconds: dict[str, float] = {}
    with peak_memory() as peak_of_pass:
        chosen = sampled(model, data, m)
    seconds["pass"] = best(lambda: sampled(model, data, m))
    with peak_memory() as peak_of_product:
        G = fi.GaussNewton(model, take(data, chosen.indices), weights=chosen.weights)
        v = torch.randn(G.dim)
        G @ v
        seconds["product"] = best(lambda: G @ v)
    for name, peak in (("pass bytes", peak_of_pass), ("product bytes", peak_of_product)):
        if peak.megabytes is not None:
            seconds[name] = peak.megabytes * 2**20
    return seconds


def sampled(model: nn.Module, data: TensorDataset, m: int) -> Any:
    """A pass with both samplers; the curvature sampler."""
    folds = CurvatureFold(m, seed=0), LogitFold(K, seed=0)
    for batch in stream(model, loader(data), progress=False):
        for fold in folds:
            fold.update(batch)
    chosen, _ = (fold.finish() for fold in folds)
    return chosen


def best(call: Callable[[], Any], repeats: int = 3) -> float:
    spans = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        spans.append(time.perf_counter() - start)
    return min(spans)


def calibrate(ranks: dict[str, Any]) -> Machine:
    """The constants of this machine at one thread, none of them measured at a size of the check."""
    model, data = network(192, 384, 300), TensorDataset(torch.randn(16 * BATCH, 192))
    few, tiny_data = nn.Linear(2, 2), TensorDataset(torch.randn(64 * BATCH, 2))
    flops = 2.0 * (192 * 384 + 384 * 300)
    batch = best(lambda: sampled(few, tiny_data, 9)) / 64
    forward = best(lambda: deque(stream(model, loader(data), progress=False), maxlen=0))
    both = best(lambda: sampled(model, data, 9))
    sizes = torch.rand(4_000_000)
    draw = CurvatureFold(1000)
    draw.take(torch.zeros(len(sizes), 1), None)
    draw.columns["sizes"].load(sizes)
    with peak_memory() as peak_of_draw:
        draw.finish()
    with peak_memory() as peak_of_little:
        sampled(few, tiny_data, 9)
    y = torch.randint(300, (BATCH,))
    G = fi.GaussNewton(model, (data.tensors[0][:BATCH], y))
    tiny = fi.GaussNewton(network(2, 2, 2), (torch.randn(8, 2), y[:8] % 2))
    v, w = torch.randn(G.dim), torch.randn(tiny.dim)
    overhead = best(lambda: tiny @ w, 20)
    return Machine(
        how="measured, one thread",
        batch=batch,
        flop=(forward - 16 * batch) / (16 * BATCH * flops),
        logit=(both - forward) / (16 * BATCH * 300),
        draw=best(draw.finish) / len(sizes),
        product=overhead,
        product_flop=(best(lambda: G @ v, 20) - overhead) / (4 * BATCH * flops),
        meeting=ranks["seconds, 2 ranks"]["meeting"],
        wire=ranks["seconds, 2 ranks"]["sum of 10^6 floats"] / 4e6,  # 2 (R-1)/R is 1
        row_bytes=4 + megabytes(peak_of_draw) / len(sizes),
        scratch=megabytes(peak_of_little),
    )


def megabytes(peak: PeakMemory) -> float:
    """In bytes; nothing is said where the system does not tell."""
    return float("nan") if peak.megabytes is None else peak.megabytes * 2**20


def page(facts: dict[str, Any]) -> str:
    lines = [
        "# Cost model\n",
        "`python bench/cost_model.py --output bench/results/cost-model` wrote this page. n rows, Y",
        "classes, R ranks; F flops of a row's forward pass, A numbers per row that it holds at",
        "once; m rows of the subset, F' flops of their forward pass through the p selected",
        "parameters and what follows them, a numbers kept per row, of `item` bytes each. The last",
        "two terms of a product and the brackets are 0 for R = 1. Bytes are those beside model and",
        "data; constants in seconds, and the last two in bytes.\n",
        FORMULAS,
        "Constants:\n",
        "| constant | " + " | ".join(m["how"] for m in facts["machines"].values()) + " |",
        "|---|---|---|",
    ]
    names = [name for name in facts["machines"]["cpu"] if name != "how"]
    for name in names:
        values = (f"{m[name]:.2e}" for m in facts["machines"].values())
        lines.append(f"| {name} | {' | '.join(values)} |")
    lines += [
        "\nPredicted / measured, at sizes that no constant was measured at:\n",
        "| size | n | Y | m | pass s | ratio | product s | ratio | pass MB | ratio | product MB |"
        " ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, check in facts["check"].items():
        cells = [name, *(f"{check['size'][i]:,}" for i in (0, 3, 4))]
        for what in ("pass", "product", "pass bytes", "product bytes"):
            value = check["measured"][what] / (1e6 if "bytes" in what else 1)
            cells += [f"{value:.3g}", f"{check['ratio'][what]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "\nPredicted, not run:\n",
        "| job | constants | pass | product | 100 products | pass GB per rank | product GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, job in facts["predicted"].items():
        t, machine = job["cost"], facts["machines"][job["machine"]]["how"]
        lines.append(
            f"| {name} | {machine} | {clock(t['pass'])} | {clock(t['product'])} | "
            f"{clock(100 * t['product'])} | {t['pass bytes'] / 1e9:.1f} | "
            f"{t['product bytes'] / 1e9:.1f} |"
        )
    return "\n".join(lines) + "\n"


def clock(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=None, help="path without a suffix")
    parser.add_argument(
        "--ranks", type=Path, default=Path(__file__).parent / "results" / "ranks-cpu.json"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machines = {"cpu": calibrate(json.loads(arguments.ranks.read_text())), "gpu": h100()}
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "machines": {name: asdict(machine) for name, machine in machines.items()},
        "check": {},
        "predicted": {
            job.name: {"job": job._asdict(), "machine": on, "cost": predict(job, machines[on])}
            for job, on in large_jobs()
        },
    }
    for name, size in SIZES.items():
        found, predicted = measured(*size), predict(small_job(name, *size), machines["cpu"])
        facts["check"][name] = {
            "size": size,
            "measured": found,
            "predicted": predicted,
            "ratio": {what: predicted[what] / value for what, value in found.items()},
        }
    print(page(facts))
    if arguments.output is not None:
        arguments.output.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(page(facts))


if __name__ == "__main__":
    main()
