"""(c) Sampler x variant: IF, PIF, FIF, GIF and SIF on a third of the parameters.

    python variants.py --setting digits

The selected parameters are those of the third of each module's units with the largest mean output
over the removed class (select_parameters). All systems have one damping, 10 % of the largest
eigenvalue of H. The error is that of delta against the same variant with all rows.
"""

from __future__ import annotations

import time
from typing import Any

import common
from torch import Tensor

import fastif_ext as fi
from fastif_ext.comparison import SAMPLERS, make_sampler
from fastif_ext.data import take
from fastif_ext.metrics import class_metrics
from fastif_ext.removal import Guard, shortest_step
from fastif_ext.spectrum import spectrum

VARIANTS = ("if", "pif", "fif", "gif", "sif")
RATIO = 1 / 3


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0], sizes=(100, 400), seeds=10).parse_args()
    case = common.load_case(arguments)
    s = case.setting
    own = s.train.tensors[1] == s.class_index
    rows = own.nonzero().flatten()
    guard = Guard(s.model, s.train, (~own).nonzero().flatten())
    removed = take(s.train, rows)
    mask = fi.select_parameters(s.model, removed, RATIO)
    full = fi.Hessian(s.model, s.loss_fn, s.train)
    like = fi.mean_gradient(s.model, s.loss_fn, removed)
    damping = 0.1 * spectrum(full, like).largest
    exact: dict[str, Tensor] = {}

    def direction(variant: str, sampler: fi.SubsetSampler | None) -> fi.InfluenceResult:
        return fi.influence(
            s.model,
            s.loss_fn,
            rows,
            s.train,
            variant=variant,
            params=None if variant == "if" else mask,
            sampler=sampler,
            solver="cg",
            damping=damping,
            tol=1e-4,
            max_iter=2000,
        )

    def run(variant: str, name: str, m: int | None, seed: int | None) -> dict[str, Any]:
        start = time.perf_counter()
        sampler = None if m is None else make_sampler(name, case.extracted, m, seed=seed or 0)
        got = direction(variant, sampler)
        seconds = time.perf_counter() - start
        if variant not in exact:
            exact[variant] = got.delta if sampler is None else direction(variant, None).delta
        want = exact[variant]
        step, _, reached = shortest_step(
            s.model, got.delta, removed, s.class_index, first=got.step, guard=guard
        )
        edited = fi.apply_update(s.model, got.delta, step)
        return {
            **class_metrics(edited, s.test, s.class_index)._asdict(),
            "error": float((got.delta - want).norm() / want.norm()),
            "iterations": got.solve.iterations,
            "converged": got.solve.converged,
            "target_reached": reached,
            "seconds": seconds,
        }

    def job(variant: str, name: str, m: int | None = None, seed: int | None = None) -> Any:
        key: dict[str, Any] = {"variant": variant, "method": name}
        if m is not None:
            key |= {"m": m, "seed": seed}
        return key, lambda: run(variant, name, m, seed)

    jobs = [job(v, "all rows") for v in VARIANTS]
    jobs += [
        job(v, name, m, seed)
        for seed in range(arguments.seeds)
        for m in arguments.sizes
        for v in VARIANTS
        for name in SAMPLERS
    ]
    name = common.name_of("variants", arguments)
    records = common.run_all(jobs, arguments.work / f"{name}.jsonl", arguments.first)
    payload = {
        **common.facts(case, arguments),
        "selected": int(mask.sum()),
        "damping": damping,
    }
    common.save(arguments.output / f"{name}.json", payload, records)


if __name__ == "__main__":
    main()
