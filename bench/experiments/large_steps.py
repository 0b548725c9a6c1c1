"""(f) The paper's second open question: large updates, by new directions on the way.

    python large_steps.py --setting digits

remove_class with its default protocol, the way cut into 1, 2 or 4 parts, a fresh subset of the rows
that stay at each; beside it one direction with the curvature of all rows, as in the paper.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import common

import fastif_ext as fi
from fastif_ext.comparison import make_sampler
from fastif_ext.metrics import class_metrics
from fastif_ext.removal import Guard, shortest_step

NAMES = ("random", "stratified", "logit", "curvature-systematic")
PARTS = (1, 2, 4)


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0], sizes=(100, 400), seeds=10).parse_args()
    case = common.load_case(arguments)
    s = case.setting
    own = case.extracted.labels == s.class_index
    rows = own.nonzero().flatten()
    guard = Guard(s.model, s.train, (~own).nonzero().flatten())

    def all_rows(name: str, m: int, seed: int) -> dict[str, Any]:
        """One direction with a subset of all rows, the class's among them."""
        start = time.process_time()
        sampler = make_sampler(name, case.extracted, m, seed=seed)
        got = fi.influence(
            s.model, s.loss_fn, rows, s.train, sampler=sampler, solver="cg", curvature=s.curvature
        )
        removed = fi.data.take(s.train, rows)
        step, _, reached = shortest_step(
            s.model, got.delta, removed, s.class_index, first=got.step, guard=guard
        )
        edited = fi.apply_update(s.model, got.delta, step)
        return {
            **class_metrics(edited, s.test, s.class_index)._asdict(),
            "target_reached": reached,
            "directions": 1,
            "length": step * float(got.delta.norm()),
            "seconds": time.process_time() - start,
        }

    def new_directions(name: str, m: int, seed: int, parts: int) -> dict[str, Any]:
        start = time.process_time()
        report = fi.remove_class(
            s.model,
            s.train,
            s.class_index,
            test=s.test,
            sampler=lambda data, k: make_sampler(name, data, m, seed=100 * seed + k),
            linearisations=parts,
            solver="cg",
            curvature=s.curvature,
            seed=seed,
        )
        return {
            **report.after._asdict(),
            "target_reached": report.target_reached,
            "directions": len(report.directions),
            "length": report.delta_norm,
            "seconds": time.process_time() - start,
        }

    def guarded(work: Any) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # target_reached says it
            try:
                return work()
            except fi.SolverDivergence as error:
                return {"failure": str(error)}

    jobs: list[Any] = [
        (
            {"method": "retraining"},
            lambda: class_metrics(case.retrain(), s.test, s.class_index)._asdict(),
        )
    ]
    for seed in range(arguments.seeds):
        for m in arguments.sizes:
            for name in NAMES:
                key = {"method": name, "m": m, "seed": seed}
                jobs.append(
                    (
                        {**key, "curvature": "all rows", "parts": 1},
                        lambda a=(name, m, seed): guarded(lambda: all_rows(*a)),
                    )
                )
                jobs += [
                    (
                        {**key, "curvature": "rows that stay", "parts": parts},
                        lambda a=(name, m, seed, parts): guarded(lambda: new_directions(*a)),
                    )
                    for parts in PARTS
                ]
    name = common.name_of("large_steps", arguments)
    records = common.run_all(jobs, arguments.work / f"{name}.jsonl", arguments.first)
    common.save(arguments.output / f"{name}.json", common.facts(case, arguments), records)


if __name__ == "__main__":
    main()
