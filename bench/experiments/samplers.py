"""(a) Sampler x subset size x seed: class removal, errors of H_S v and of the iHVP.

    python samplers.py --setting digits
    python samplers.py --setting fashion-mnist

Each run draws a subset, takes its curvature, removes the class along one direction (the shortest
step with which training self-accuracy falls below 1 %), and measures the subset against all rows.
Beside the samplers stand retraining, the influence with all rows and plain gradient ascent.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import common

from fastif_ext.comparison import SAMPLERS, Comparison, Record

SIZES = (100, 400, 800, 1200, 1600)
SEEDS = 25


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0], sizes=SIZES, seeds=SEEDS)
    arguments.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    arguments = arguments.parse_args()
    case = common.load_case(arguments)
    comparison = Comparison(case.setting, case.extracted)
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
    records = common.run_all(jobs, arguments.work / f"{name}.jsonl")
    payload = {**common.facts(case, arguments), "common_damping": comparison.common_damping}
    common.save(arguments.output / f"{name}.json", payload, records)


def _retrained(case: Any, comparison: Comparison) -> Record:
    return comparison.retrained(case.retrained, case.retrain_seconds)


if __name__ == "__main__":
    main()
