"""The paper's claims, each with what was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from common import table
from scipy import stats

from sections.runs import Results, is_run, sizes


def verdicts(found: list[Results]) -> str:
    """The paper's claims, each with what was measured."""
    claims: list[tuple[str, Callable[[Results], tuple[bool, str]]]] = [
        (
            "Logit sampling gives a higher F1 than random sampling",
            lambda r: _better(r["records"], "logit", "random", "f1", +1),
        ),
        (
            "Logit sampling gives a higher F1 than stratified sampling, the control that the "
            "paper lacks",
            lambda r: _better(r["records"], "logit", "stratified", "f1", +1),
        ),
        (
            "Logit sampling gives a better iHVP than stratified sampling",
            lambda r: _better(r["records"], "logit", "stratified", "ihvp_error", -1),
        ),
        (
            "Feature sampling (distance) gives a better iHVP than stratified sampling",
            lambda r: _better(r["records"], "feature-distance", "stratified", "ihvp_error", -1),
        ),
        (
            "Feature sampling (nearest) gives a better iHVP than stratified sampling",
            lambda r: _better(r["records"], "feature-nearest", "stratified", "ihvp_error", -1),
        ),
        (
            "Curvature sampling with weights (ours) gives a better iHVP than stratified sampling",
            lambda r: _better(r["records"], "curvature", "stratified", "ihvp_error", -1),
        ),
        (
            "Systematic curvature sampling (ours) gives a better iHVP than curvature sampling",
            lambda r: _better(r["records"], "curvature-systematic", "curvature", "ihvp_error", -1),
        ),
        (
            "Systematic curvature sampling (ours) gives a higher F1 than stratified sampling",
            lambda r: _better(r["records"], "curvature-systematic", "stratified", "f1", +1),
        ),
    ]
    rows = []
    for claim, judge in claims:
        for r in found:
            holds, words = judge(r)
            rows.append([claim, r["data"], "**holds**" if holds else "does not hold", words])
            claim = ""
    note = (
        "A claim holds in a setting where it holds at most sizes with p < .01 and is contradicted "
        "at none with p < .01."
    )
    return note + "\n\n" + table(["claim", "setting", "", "sizes: better / worse / neither"], rows)


def _better(
    records: list[dict[str, Any]], name: str, other: str, field: str, sign: int
) -> tuple[bool, str]:
    """Whether `name` beats `other` at most sizes and loses at none, at p < .01 each."""
    better, worse, neither = [], [], []
    for m in sizes(records):
        mine, theirs = (
            {r["seed"]: r[field] for r in records if is_run(r, x, m) and r.get(field) is not None}
            for x in (name, other)
        )
        seeds = sorted(mine.keys() & theirs.keys())
        d = sign * np.array([mine[s] - theirs[s] for s in seeds])
        p = 1.0 if len(d) < 6 or not d.any() else float(stats.wilcoxon(d).pvalue)
        group = neither if p >= 0.01 else better if np.median(d) > 0 else worse
        group.append(m)
    holds = len(better) * 2 > len(sizes(records)) and not worse
    return holds, " / ".join(", ".join(map(str, g)) or "-" for g in (better, worse, neither))
