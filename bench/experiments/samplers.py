"""(a) Sampler x subset size x seed: class removal, errors of H_S v and of the iHVP.

    python samplers.py --setting digits
    python samplers.py --setting fashion-mnist

Each run draws a subset, takes its curvature, removes the class along one direction (the shortest
step with which training self-accuracy falls below 1 %), and measures the subset against all rows.
Beside the samplers stand retraining, the influence with all rows and plain gradient ascent.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

import common

from fastif_ext.comparison import SAMPLERS, Comparison, Record

SIZES = (100, 400, 800, 1200, 1600)
SEEDS = 25


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0], sizes=SIZES, seeds=SEEDS)
    arguments.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    arguments.add_argument("--damping", type=float, default=None, help="for all; default: auto")
    arguments = arguments.parse_args()
    case = common.load_case(arguments)
    setting = case.setting
    if arguments.damping is not None:
        setting = replace(setting, damping=arguments.damping)
    comparison = Comparison(setting, case.extracted)
    n = len(case.setting.train)

    def result(record: Record) -> dict[str, Any]:
        return {k: v for k, v in asdict(record).items() if k not in ("method", "m", "seed")}

    jobs = [
        ({"method": "retraining"}, lambda: result(_retrained(case, comparison))),
        ({"method": "exact influence"}, lambda: result(comparison.exact())),
        ({"method": "gradient only"}, lambda: result(comparison.gradient_only())),
    ]
    jobs += [
        (
            {"method": s, "m": m, "seed": seed},
            lambda s=s, m=m, k=seed: result(comparison.subset(s, m, k)),
        )
        for seed in range(arguments.seeds)
        for m in arguments.sizes
        if m <= n
        for s in arguments.samplers
    ]
    name = common.name_of("samplers", arguments)
    if arguments.damping is not None:
        name += f"-damping-{arguments.damping:g}"
    records = common.run_all(jobs, arguments.work / f"{name}.jsonl", arguments.first)
    payload = {**common.facts(case, arguments), "common_damping": comparison.common_damping}
    payload["damping"] = arguments.damping
    common.save(arguments.output / f"{name}.json", payload, records)


def _retrained(case: Any, comparison: Comparison) -> Record:
    start = time.perf_counter()
    return comparison.retrained(case.retrain(), time.perf_counter() - start)


if __name__ == "__main__":
    main()
