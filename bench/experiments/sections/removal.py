"""(f): sampling the removal set, large updates."""

from __future__ import annotations

import numpy as np
from common import cell, table, values

from sections.runs import Results, conditions, methods, sizes


def removal_set(found: list[Results]) -> str:
    parts = [
        "## Open question: sampling the removal set",
        "A few rows of the class stand for all of it in the gradient; curvature on all rows that "
        "stay.",
    ]
    for r in found:
        records = r["records"]
        whole = values(records, "f1", method="all of the class")[0]
        rows = [
            [
                m,
                *(
                    text
                    for name in ("random", "residual")
                    for text in (
                        cell(values(records, "error", method=name, m=m)),
                        cell(values(records, "f1", method=name, m=m)),
                    )
                ),
            ]
            for m in sizes(records)
        ]
        parts += [
            f"### {r['data']}",
            conditions(r, "removal_set"),
            f"All {r['removed_rows']:,} rows of the class: F1 {whole:.3f}.",
            table(
                [
                    "rows",
                    "random: error of g",
                    "random: F1",
                    "residual: error of g",
                    "residual: F1",
                ],
                rows,
            ),
        ]
    return "\n\n".join(parts)


def large_steps(found: list[Results]) -> str:
    parts = [
        "## Open question: large updates",
        "remove_class with the way cut into 1, 2 or 4 parts, direction and subset taken anew at "
        "each, curvature of the rows that stay; beside it one direction with the curvature of all "
        "rows, as in the paper.",
    ]
    for r in found:
        records = r["records"]
        retrained = next(x for x in records if x["method"] == "retraining")
        rows = [
            [
                m,
                name,
                curvature,
                n,
                cell(values(records, "f1", **at)),
                cell(values(records, "self_accuracy", **at)),
                cell(values(records, "remaining_accuracy", **at)),
                f"{np.median(values(records, 'seconds', **at)):.2f}",
            ]
            for m in sizes(records)
            for name in methods(records)
            for curvature, n in (("all rows", 1), *(("rows that stay", k) for k in (1, 2, 4)))
            for at in [{"method": name, "m": m, "curvature": curvature, "parts": n}]
            if values(records, "f1", **at)
        ]
        parts += [
            f"### {r['data']}",
            conditions(r, "large_steps"),
            f"Retraining: F1 {retrained['f1']:.3f}, remaining accuracy "
            f"{retrained['remaining_accuracy']:.3f}.",
            table(
                ["m", "sampler", "curvature", "parts", "F1", "self acc.", "rem. acc.", "CPU s"],
                rows,
            ),
        ]
    return "\n\n".join(parts)
