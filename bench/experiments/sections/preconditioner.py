"""Does a Jacobi preconditioner pay?"""

from __future__ import annotations

from common import table

from sections.runs import Results


def preconditioner(found: list[Results]) -> str:
    rows = [
        [x["model"], x["curvature"], x["share"], x["none"], x["jacobi"], x["estimated"]]
        for r in found
        for x in r["records"]
    ]
    return "\n\n".join(
        [
            "## Does a Jacobi preconditioner pay in conjugate gradients?",
            "No. Iterations to a residual of 1e-3 on digits, a systematic curvature subset of 400 "
            "rows (`python bench/experiments/preconditioner.py`): without, with the exact "
            "diagonal, with the diagonal estimated from 10 products.",
            table(["model", "curvature", "damping / largest", "none", "exact", "estimated"], rows),
        ]
    )
