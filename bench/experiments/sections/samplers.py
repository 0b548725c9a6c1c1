"""(a) and (e): samplers, sizes, seeds; time and memory at equal F1."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from common import cell, paired, table, values

from fastif_ext import report
from fastif_ext.comparison import Record
from sections.claims import verdicts
from sections.runs import WITHIN, Results, conditions, is_run, methods, sizes


def samplers(found: list[Results]) -> str:
    found = [r | {"damping": r.get("damping")} for r in found]
    automatic = [r for r in found if r["damping"] is None]
    parts = ["## Samplers, subset sizes, seeds", verdicts(automatic)]
    for r in automatic:
        records = r["records"]
        stem = r["path"].stem
        known = {f.name for f in fields(Record)}
        as_records = [
            Record(**{"m": None, "seed": None, **{k: v for k, v in x.items() if k in known}})
            for x in records
        ]
        title = f"{r['data']}: forgetting class {r['class_index']} ({r['class']})"
        report.plot(as_records, r["path"].with_suffix(".png"), title=title)
        parts += [
            f"### {r['data']}",
            conditions(r, "samplers"),
            f"![{title}](experiments/{stem}.png)",
            _against(records),
            "<details><summary>All columns</summary>\n\n" + report.table(as_records),
            "</details>",
            "Time and memory at equal F1: the smallest size whose mean F1 is within "
            f"{WITHIN} of exact influence's, and what a removal then costs.",
            _equal_f1(records),
        ]
    for r in found:
        if r["damping"] is not None:
            parts += [
                f"### {r['data']} with one damping for all, {r['damping']:g}",
                conditions(r, "samplers"),
                "The damping of a subset is above chosen from its own spectrum, which evens F1 "
                "out. With one for all, a subset whose Hessian has an eigenvalue below -damping is "
                "refused: there is no sound update, and F1 is that of the model as it was.",
                _one_damping(r["records"]),
            ]
    return "\n\n".join(parts)


def _one_damping(records: list[dict[str, Any]]) -> str:
    exact = next(r["f1"] for r in records if r["method"] == "exact influence")
    rows = []
    for m in sizes(records):
        for name in methods(records):
            own = [r for r in records if is_run(r, name, m)]
            failed = [r for r in own if r.get("failure")]
            f1 = [r.get("f1", 0.0) for r in own]
            near = sum(v >= exact - WITHIN for v in f1)
            rows.append(
                [m, name, f"{len(failed)} of {len(own)}", cell(f1), f"{near} of {len(own)}"]
            )
    head = [
        "m",
        "sampler",
        "refused",
        "F1, refused as 0",
        f"within {WITHIN} of exact's {exact:.3f}",
    ]
    return table(head, rows)


def _against(records: list[dict[str, Any]]) -> str:
    rows = []
    for m in sizes(records):
        for name in methods(records):
            at = {"method": name, "m": m}
            rows.append(
                [
                    m,
                    name,
                    cell(values(records, "f1", **at)),
                    paired(records, "f1", "random", **at) if name != "random" else "",
                    paired(records, "f1", "stratified", **at) if name != "stratified" else "",
                    cell(values(records, "hvp_error", **at)),
                    cell(values(records, "ihvp_error", **at)),
                    paired(records, "ihvp_error", "stratified", **at)
                    if name != "stratified"
                    else "",
                ]
            )
    head = [
        "m",
        "sampler",
        "F1",
        "F1 - random's",
        "F1 - stratified's",
        "error of H_S v",
        "error of iHVP",
        "iHVP error - stratified's",
    ]
    return table(head, rows)


def _equal_f1(records: list[dict[str, Any]]) -> str:
    exact = values(records, "f1", method="exact influence")[0]
    rows = [["exact influence", "all", f"{exact:.3f}", *_cost(records, method="exact influence")]]
    for name in methods(records):
        good = [
            m
            for m in sizes(records)
            if np.mean(values(records, "f1", method=name, m=m)) >= exact - WITHIN
        ]
        if not good:
            rows.append([name, f"> {sizes(records)[-1]}", "-", "-", "-"])
            continue
        at = {"method": name, "m": good[0]}
        f1 = f"{np.mean(values(records, 'f1', **at)):.3f}"
        rows.append([name, good[0], f1, *_cost(records, **at)])
    return table(["sampler", "size m", "F1", "seconds", "peak MB"], rows)


def _cost(records: list[dict[str, Any]], **at: Any) -> list[str]:
    seconds, memory = (values(records, k, **at) for k in ("solve_seconds", "peak_megabytes"))
    return [f"{np.median(seconds):.2f}", f"{np.median(memory):.0f}" if memory else "-"]
