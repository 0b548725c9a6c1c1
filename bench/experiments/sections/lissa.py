"""(d): LiSSA's iterations."""

from __future__ import annotations

from typing import Any

import numpy as np
from common import cell, table, values

from sections.runs import Results, conditions, methods, sizes


def lissa(found: list[Results]) -> str:
    parts = [
        "## LiSSA's iterations",
        "Iterations to a true residual of 1e-3, over the runs that were not refused as indefinite "
        "(in brackets: how many of the seeds were). Damping as a share of the largest eigenvalue "
        "of all rows' Hessian. What decides is the ratio of scale to damping, not the sampler: "
        "where a sampler needs fewer, its Hessian is smaller, and its error tells.",
    ]
    for r in found:
        records = r["records"]
        names = methods(records)
        parts += [f"### {r['data']}", conditions(r, "lissa")]
        for what, of in (("Iterations", _iterations), ("Error of the solution", _error)):
            rows = [
                [share, m, *(of(records, share, n, m) for n in names)]
                for share in dict.fromkeys(x["damping_share"] for x in records)
                for m in sizes(records)
                if not (of is _error and share == "auto")
            ]
            parts += [what + ":", table(["damping", "m", *names], rows)]
    return "\n\n".join(parts)


def _iterations(records: list[dict[str, Any]], share: Any, name: str, m: int) -> str:
    at = {"damping_share": share, "method": name, "m": m}
    done = values(records, "iterations", **at)
    failed = sum(values(records, "failed", **at))
    text = f"{np.median(done):.0f}" if done else "-"
    slow = len([1 for ok in values(records, "converged", **at) if not ok])
    return text + (f" ({failed} refused)" if failed else "") + (f" ({slow} slow)" if slow else "")


def _error(records: list[dict[str, Any]], share: Any, name: str, m: int) -> str:
    at = {"damping_share": share, "method": name, "m": m}
    return cell(values(records, "error", **at), "{:.2f}")
