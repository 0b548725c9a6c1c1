"""(c): sampler by variant."""

from __future__ import annotations

from common import cell, table, values

from sections.runs import Results, conditions, methods, sizes


def variants(found: list[Results]) -> str:
    parts = [
        "## Variants: IF, PIF, FIF, GIF, SIF",
        "PIF, FIF, GIF and SIF move a third of each module's units (select_parameters by mean "
        "output); IF moves all. The error is that of delta against the same variant with all rows.",
    ]
    for r in found:
        records = r["records"]
        names = methods(records)
        for field, form, what in (("error", "{:.2f}", "Error of delta"), ("f1", "{:.3f}", "F1")):
            rows = [
                [
                    v,
                    m,
                    "{:.3f}".format(values(records, "f1", variant=v, method="all rows")[0])
                    if field == "f1"
                    else "0",
                    *(cell(values(records, field, variant=v, method=n, m=m), form) for n in names),
                ]
                for v in dict.fromkeys(x["variant"] for x in records)
                for m in sizes(records)
            ]
            if field == "error":
                parts += [
                    f"### {r['data']}",
                    conditions(r, "variants")
                    + f" Damping {r['damping']:.3g}; {r['selected']} parameters selected.",
                ]
            parts += [what + ":", table(["variant", "m", "all rows", *names], rows)]
    return "\n\n".join(parts)
