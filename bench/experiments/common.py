"""What the experiments share: resumable runs, intervals and paired tests, files and tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import settings
import torch
from scipy import stats
from tqdm.auto import tqdm

from fastif_ext.build import build_info
from fastif_ext.report import interval

RESULTS = Path(__file__).resolve().parents[1] / "results" / "experiments"


def parser(description: str, *, sizes: Sequence[int], seeds: int) -> argparse.ArgumentParser:
    """The options that every experiment has."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--setting", choices=settings.NAMES, default="digits")
    p.add_argument("--data", default=None, help="digits | fashion-mnist[:DIR] | mnist:DIR | ...")
    p.add_argument("--weights", type=Path, default=None, help="a trained state_dict")
    p.add_argument("--whole", action="store_true", help="move all parameters, not the last layers")
    p.add_argument("--class", type=int, default=None, dest="class_index", help="to remove")
    p.add_argument("--sizes", type=int, nargs="+", default=list(sizes), help="subset sizes")
    p.add_argument("--seeds", type=int, default=seeds, help="draws per sampler and size")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--device", default="cpu")
    p.add_argument("--first", type=int, default=None, help="only so many runs, for a try")
    p.add_argument("--work", type=Path, default=Path("experiments"), help="trained weights, logs")
    p.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    return p


def load_case(arguments: argparse.Namespace) -> settings.Case:
    """The setting that the options name."""
    torch.set_num_threads(arguments.threads)
    return settings.load(
        arguments.setting,
        work=arguments.work,
        data=arguments.data,
        weights=arguments.weights,
        whole=arguments.whole,
        class_index=arguments.class_index,
        device=arguments.device,
    )


def name_of(experiment: str, arguments: argparse.Namespace) -> str:
    """Of an experiment's files."""
    whole = "-whole" if arguments.whole else ""
    return f"{experiment}-{arguments.setting}{whole}"


def run_all(
    jobs: Sequence[tuple[dict[str, Any], Callable[[], dict[str, Any]]]],
    log: Path,
    first: int | None = None,
) -> list[dict[str, Any]]:
    """Run every job that the log does not hold yet; each is written to it as soon as it is done.

    Args:
        jobs: (key, work) pairs; the key tells the job from all others.
        log: JSON lines of {key, result}.
        first: run only so many.

    Returns:
        key and result of every job, in the order of the jobs, merged into one dict each.
    """
    done: dict[str, dict[str, Any]] = {}
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.is_file():
        for line in log.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was killed
                continue
            done[json.dumps(entry["key"], sort_keys=True)] = entry["result"]
    found = []
    with tqdm(jobs[:first], desc=log.stem, unit="run") as bar, log.open("a") as out:
        for key, work in bar:
            name = json.dumps(key, sort_keys=True)
            if name not in done:
                bar.set_postfix_str(", ".join(map(str, key.values())))
                done[name] = work()
                out.write(json.dumps({"key": key, "result": done[name]}) + "\n")
                out.flush()
            found.append({**key, **done[name]})
    return found


def facts(case: settings.Case | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Where and how a run was made."""
    return {
        **({} if case is None else case.facts),
        "sizes": arguments.sizes,
        "seeds": arguments.seeds,
        "threads": arguments.threads,
        "device": arguments.device,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "build": build_info(),
    }


def save(path: Path, payload: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    """Facts and records, one record a line, written whole or not at all."""
    head = json.dumps({**payload, "records": []}, indent=1)
    rows = ",\n".join(json.dumps(_rounded(record)) for record in records)
    text = head.removesuffix("[]\n}") + "[\n" + rows + "\n]}\n"
    json.loads(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
    print(f"written: {path}")


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    """Six digits of every number."""
    return {
        k: float(f"{v:.6g}") if isinstance(v, float) else v
        for k, v in record.items()
        if v is not None
    }


def values(records: Sequence[dict[str, Any]], field: str, **where: Any) -> list[float]:
    """A field of the records that match, in the order of the seeds; failed runs have none."""
    chosen = [r for r in records if all(r.get(k) == v for k, v in where.items())]
    chosen.sort(key=lambda r: r.get("seed") or 0)
    return [r[field] for r in chosen if r.get(field) is not None]


def cell(found: Sequence[float], form: str = "{:.3f}") -> str:
    """A mean with its 95 % bootstrap interval."""
    if not found:
        return "-"
    if len(found) == 1:
        return form.format(found[0])
    got = interval(found)
    return f"{form} [{form}, {form}]".format(*got)


def paired(records: Sequence[dict[str, Any]], field: str, other: str, **where: Any) -> str:
    """Mean difference to another sampler over the seeds that both have, and Wilcoxon's p."""
    mine = {r["seed"]: r[field] for r in records if _fits(r, where) and r.get(field) is not None}
    theirs = {
        r["seed"]: r[field]
        for r in records
        if _fits(r, {**where, "method": other}) and r.get(field) is not None
    }
    seeds = sorted(mine.keys() & theirs.keys())
    if len(seeds) < 5:
        return "-"
    d = np.array([mine[s] - theirs[s] for s in seeds])
    p = 1.0 if not d.any() else float(stats.wilcoxon(d).pvalue)
    return f"{d.mean():+.3f} (p {'< .001' if p < 1e-3 else f'{p:.3f}'.lstrip('0')})"


def _fits(record: dict[str, Any], where: dict[str, Any]) -> bool:
    return all(record.get(k) == v for k, v in where.items())


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(map(str, head)) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def load_results(path: Path) -> dict[str, Any]:
    """What `save` wrote."""
    return json.loads(path.read_text())
