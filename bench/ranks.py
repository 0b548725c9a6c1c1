"""One rank against several, at one thread each: a pass, a sample, products with the curvature.

    python bench/ranks.py --ranks 1 2 --output bench/results/ranks-cpu.json

Every run starts torchrun on this file, which times the work on all ranks from one meeting to the
next: a job of one rank pays for meetings and collectives, too. `alone` is the same work without
fastif_ext.distributed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import fastif_ext as fi
from fastif_ext import distributed as fid
from fastif_ext.data import loader, take
from fastif_ext.samplers import CurvatureFold, CurvatureSampler

SIZES = {
    "rows": 360_000,
    "width": 256,
    "hidden": 512,
    "classes": 100,
    "sampled": 12_000,
    "products": 10,
}
PHASES = ("sample", "operator", "products")


def problem(rows: int, width: int, hidden: int, classes: int) -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, classes))
    return model, TensorDataset(torch.randn(rows, width), torch.randint(classes, (rows,)))


def work(sizes: dict[str, int], ranks: fid.Ranks | None) -> dict[str, float]:
    """Seconds of each phase."""
    shape = (sizes[name] for name in ("rows", "width", "hidden", "classes"))
    model, data = problem(*shape)
    clock: list[float] = []

    def lap() -> None:
        if ranks is not None:
            ranks.meet("lap")
        clock.append(time.perf_counter())

    lap()
    if ranks is None:
        sampler = CurvatureSampler.from_loader(
            model, loader(data), sizes["sampled"], progress=False
        )
    else:
        fold = CurvatureFold(sizes["sampled"], seed=0)
        sampler = fid.sample(fold, model, loader(data), progress=False, group=ranks)
    lap()
    subset = take(data, sampler.indices)
    H: Any
    if ranks is None:
        H = fi.GaussNewton(model, subset, weights=sampler.weights)
    else:
        H = fid.curvature(
            *("gauss-newton", model, cross_entropy, subset), weights=sampler.weights, group=ranks
        )
    v: Tensor = torch.randn(H.dim, generator=torch.Generator().manual_seed(1))
    v = (H @ v) / v.norm()  # the first product builds what all others use
    lap()
    for _ in range(sizes["products"]):
        v = H @ v
        v /= v.norm()
    lap()
    spans = zip(PHASES, clock[:-1], clock[1:], strict=True)
    return {name: end - start for name, start, end in spans}


def contact(ranks: fid.Ranks) -> dict[str, float]:
    """Seconds that ranks take to meet, and to sum a million floats once they have met."""
    many = torch.ones(1_000_000)
    start = time.perf_counter()
    for _ in range(200):
        ranks.meet("nothing")
    meeting = (time.perf_counter() - start) / 200
    start = time.perf_counter()
    for _ in range(20):
        ranks.all_reduce("sum", many)
    return {
        "meeting": meeting,
        "sum of 10^6 floats": (time.perf_counter() - start) / 20 - meeting,
    }


def main_of_a_rank(path: str, repeats: int, sizes: dict[str, int]) -> None:
    torch.set_num_threads(1)
    ranks = None
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        ranks = fid.Ranks()
    laps = [work(sizes, ranks) for _ in range(repeats + 1)][1:]
    if ranks is not None:
        laps[-1] |= contact(ranks)
    if ranks is None or ranks.rank == 0:
        Path(path).write_text(json.dumps(laps))
    if ranks is not None:
        dist.barrier()
        dist.destroy_process_group()


def run(size: int, repeats: int, sizes: dict[str, int]) -> list[dict[str, float]]:
    """The laps of a job; size 0 is one process alone."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/laps.json"
        job = [__file__, "--rank-of", path, "--repeats", str(repeats)]
        job += [f"--{name}={value}" for name, value in sizes.items()]
        subprocess.run(
            [sys.executable, *(torchrun if size else []), *job],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        laps: list[dict[str, float]] = json.loads(Path(path).read_text())
    return laps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="of the work in a job, after one")
    parser.add_argument("--rounds", type=int, default=2, help="jobs of each size, taking turns")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--rank-of", default=None, help=argparse.SUPPRESS)
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in SIZES}
    if arguments.rank_of:
        main_of_a_rank(arguments.rank_of, arguments.repeats, sizes)
        return
    laps: dict[int, list[dict[str, float]]] = {size: [] for size in (0, *arguments.ranks)}
    for _ in range(arguments.rounds):
        for size in laps:
            laps[size] += run(size, arguments.repeats, sizes)
    seconds = {
        str(size or "alone"): {
            phase: statistics.median(lap[phase] for lap in found) for phase in PHASES
        }
        | {"all": statistics.median(sum(lap[phase] for phase in PHASES) for lap in found)}
        for size, found in laps.items()
    }
    first = seconds[str(arguments.ranks[0])]
    facts = {
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "threads per rank": 1,
        "sizes": sizes,
        "median seconds": seconds,
        f"seconds, {arguments.ranks[-1]} ranks": {
            name: statistics.median(lap[name] for lap in laps[arguments.ranks[-1]] if name in lap)
            for name in ("meeting", "sum of 10^6 floats")
        },
        "times as fast as the first": {
            size: {phase: first[phase] / s[phase] for phase in s} for size, s in seconds.items()
        },
        "laps": {str(size or "alone"): found for size, found in laps.items()},
    }
    print(json.dumps({k: v for k, v in facts.items() if k != "laps"}, indent=1))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
