"""(f) The paper's first open question: a sample of the removal set in place of all of it.

    python removal_set.py --setting fashion-mnist

Rows of the removed class are drawn at random or by residual norm (ResidualSampler); the error is
that of the mean gradient, F1 that of the removal along one direction with the curvature of all rows
that stay.
"""

from __future__ import annotations

from typing import Any

import common
import torch

import fastif_ext as fi
from fastif_ext.curvature import make_curvature
from fastif_ext.data import take
from fastif_ext.metrics import class_metrics
from fastif_ext.removal import Guard, shortest_step
from fastif_ext.spectrum import automatic_damping, spectrum


def main() -> None:
    arguments = common.parser(
        __doc__.splitlines()[0], sizes=(10, 25, 50, 100, 200), seeds=25
    ).parse_args()
    case = common.load_case(arguments)
    s = case.setting
    own = case.extracted.labels == s.class_index
    rows, kept = own.nonzero().flatten(), (~own).nonzero().flatten()
    removed = take(s.train, rows)
    guard = Guard(s.model, s.train, kept)
    logits, labels = case.extracted.logits[rows], case.extracted.labels[rows]
    H = make_curvature(s.curvature, s.model, s.loss_fn, take(s.train, kept))
    whole = fi.mean_gradient(s.model, s.loss_fn, removed)
    damping = automatic_damping(spectrum(H, whole))

    def run(name: str, m: int | None, seed: int | None) -> dict[str, Any]:
        if m is None:
            g = whole
        else:
            chosen = (
                fi.RandomSampler(len(rows), m, seed=seed)
                if name == "random"
                else fi.ResidualSampler(logits, labels, m, seed=seed)
            )
            g = fi.mean_gradient(
                s.model, s.loss_fn, take(removed, chosen.indices), weights=chosen.weights
            )
        delta = fi.cg(H, g, damping=damping, tol=1e-3).x
        first = len(rows) / len(kept)
        step, _, reached = shortest_step(
            s.model, delta, removed, s.class_index, first=first, guard=guard
        )
        edited = fi.apply_update(s.model, delta, step)
        return {
            **class_metrics(edited, s.test, s.class_index)._asdict(),
            "error": float((g - whole).norm() / whole.norm()),
            "cosine": float(torch.cosine_similarity(g, whole, dim=0)),
            "target_reached": reached,
        }

    jobs: list[Any] = [({"method": "all of the class"}, lambda: run("", None, None))]
    jobs += [
        ({"method": name, "m": m, "seed": seed}, lambda a=(name, m, seed): run(*a))
        for seed in range(arguments.seeds)
        for m in arguments.sizes
        if m <= len(rows)
        for name in ("random", "residual")
    ]
    name = common.name_of("removal_set", arguments)
    records = common.run_all(jobs, arguments.work / f"{name}.jsonl", arguments.first)
    payload = {**common.facts(case, arguments), "removed_rows": len(rows), "damping": damping}
    common.save(arguments.output / f"{name}.json", payload, records)


if __name__ == "__main__":
    main()
