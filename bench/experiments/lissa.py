"""(d) Plain LiSSA's iterations to tolerance, by sampler, subset size and damping.

    python lissa.py --setting digits

Damping is a share of the largest eigenvalue of all rows' Hessian, or "auto". Iterations count until
the true residual is 1e-3; `failed` says that the damped subset was indefinite. The error is that of
the solution against all rows' with the same damping.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import common

import fastif_ext as fi
from fastif_ext.comparison import SAMPLERS, make_sampler
from fastif_ext.curvature import make_curvature
from fastif_ext.data import take
from fastif_ext.spectrum import spectrum

SHARES = ("auto", 0.1, 0.03, 0.01)
MAX_ITER = 5000


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0], sizes=(100, 400), seeds=10).parse_args()
    case = common.load_case(arguments)
    s = case.setting
    rows = (s.train.tensors[1] == s.class_index).nonzero().flatten()
    g = fi.mean_gradient(s.model, s.loss_fn, take(s.train, rows))
    full = make_curvature(s.curvature, s.model, s.loss_fn, s.train)
    top = spectrum(full, g).largest
    exact = {
        share: fi.cg(full, g, damping=share * top, tol=1e-5).x
        for share in SHARES
        if isinstance(share, float)
    }

    def run(share: Any, name: str, m: int, seed: int) -> dict[str, Any]:
        sampler = make_sampler(name, case.extracted, m, seed=seed)
        subset = take(s.train, sampler.indices)
        H = make_curvature(s.curvature, s.model, s.loss_fn, subset, weights=sampler.weights)
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # not converged: said in the record
                got = fi.lissa(
                    H,
                    g,
                    damping=share if share == "auto" else share * top,
                    tol=1e-3,
                    max_iter=MAX_ITER,
                    acceleration=None,
                )
        except fi.SolverDivergence:
            return {"failed": True}
        want = exact.get(share)
        return {
            "failed": False,
            "iterations": got.iterations,
            "converged": got.converged,
            "scale": got.scale,
            "damping": got.damping,
            "error": None if want is None else float((got.x - want).norm() / want.norm()),
            "seconds": time.perf_counter() - start,
        }

    jobs = [
        (
            {"damping_share": share, "method": name, "m": m, "seed": seed},
            lambda a=(share, name, m, seed): run(*a),
        )
        for seed in range(arguments.seeds)
        for m in arguments.sizes
        for share in SHARES
        for name in SAMPLERS
    ]
    name = common.name_of("lissa", arguments)
    records = common.run_all(jobs, arguments.work / f"{name}.jsonl", arguments.first)
    payload = {**common.facts(case, arguments), "largest_eigenvalue": top, "max_iter": MAX_ITER}
    common.save(arguments.output / f"{name}.json", payload, records)


if __name__ == "__main__":
    main()
