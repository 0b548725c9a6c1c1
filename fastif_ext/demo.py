"""The main job on one page: all samplers in class removal on scikit-learn's digits."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from fastif_ext import datasets, models, report
from fastif_ext.build import build_info
from fastif_ext.comparison import SAMPLERS, Comparison, Record, Setting
from fastif_ext.data import device_of, loader, take, to_device
from fastif_ext.extract import extract
from fastif_ext.training import train_lbfgs

L2 = 1e-3  # the training objective is mean cross-entropy + L2/2 |theta|^2
SIZES = (50, 100, 200, 400)
SEEDS = 10


def run(
    output: Path,
    *,
    class_index: int = 3,
    sizes: Sequence[int] = SIZES,
    seeds: int = SEEDS,
    samplers: Sequence[str] = SAMPLERS,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> list[Record]:
    """Train, remove a class with every sampler, print the table, write JSON and PNG.

    Args:
        output: folder for demo.json and demo.png; it is made where it does not exist.
        class_index: the digit to forget.
        sizes: subset sizes, from 10 (one row for each digit) to the number of training rows.
        seeds: draws of each sampler at each size.
        samplers: names from fastif_ext.comparison.SAMPLERS.
        device: where to train and solve.
        progress: show a progress bar.

    Returns:
        All records.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is tiny: a second thread waits more than it works
    try:
        if seeds < 1:
            raise ValueError(f"demo: seeds must be at least 1, got {seeds}")
        return _run(output, class_index, sizes, seeds, samplers, torch.device(device), progress)
    finally:
        torch.set_num_threads(threads)


def _run(
    output: Path,
    class_index: int,
    sizes: Sequence[int],
    seeds: int,
    samplers: Sequence[str],
    device: torch.device,
    progress: bool,
) -> list[Record]:
    start = time.perf_counter()
    data = datasets.load("digits")
    train, test = data.train, data.test
    if not 0 <= class_index < len(data.classes):
        raise ValueError(f"class_index must be a digit from 0 to 9, got {class_index}")
    output.mkdir(parents=True, exist_ok=True)
    print(f"Training an MLP 64-32-10 on {len(train)} digits; class {class_index} will be removed.")
    model = _trained(train, device)
    extracted = extract(model, loader(train), layer="penultimate", progress=False)
    comparison = Comparison(Setting(model, train, test, class_index), extracted)
    kept = (train.tensors[1] != class_index).nonzero().flatten()
    records = [
        _retrain(comparison, take(train, kept)),
        comparison.exact(),
        comparison.gradient_only(),
    ]
    grid = [(s, m, seed) for s in samplers for m in sizes for seed in range(seeds)]
    with tqdm(grid, desc="removals", unit="run", disable=None if progress else True) as bar:
        for sampler, m, seed in bar:
            bar.set_postfix_str(f"{sampler}, m={m}")
            records.append(comparison.subset(sampler, m, seed))

    seconds = time.perf_counter() - start
    print("\n" + report.table(records))
    print(
        f"\nF1 and accuracies on {len(test)} test digits; errors against the Hessian of all "
        f"{len(train)} training digits,\nof the iHVP at one damping for all subsets "
        f"({comparison.common_damping:.2f}); removal takes the automatic damping.\n95 % bootstrap "
        f"intervals over {seeds} seeds. {seconds:.0f} s on "
        f"{'one thread' if device.type == 'cpu' else device}."
    )
    facts: dict[str, Any] = {
        "data": "digits",
        "class_index": class_index,
        "sizes": list(sizes),
        "seeds": seeds,
        "common_damping": comparison.common_damping,
        "seconds": round(seconds, 1),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "machine": platform.machine(),
        "build": build_info(),
    }
    report.write_json(output / "demo.json", facts, records)
    report.plot(records, output / "demo.png", title=f"Forgetting digit {class_index}")
    print(f"Written: {output / 'demo.json'}, {output / 'demo.png'}")
    return records


def _trained(rows: TensorDataset, device: torch.device) -> torch.nn.Module:
    model = models.build("mlp", seed=0, dtype=torch.float64).to(device)
    train_lbfgs(model, *to_device(rows.tensors, device), l2=L2)
    return model


def _retrain(comparison: Comparison, kept: TensorDataset) -> Record:
    start = time.perf_counter()
    model = _trained(kept, device_of(comparison.setting.model))
    return comparison.retrained(model, time.perf_counter() - start)
