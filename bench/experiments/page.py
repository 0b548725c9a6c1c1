"""Write bench/results/experiments.md and its plots from the JSON files of the experiments.

    python page.py

Every figure on the page comes from a file in bench/results/experiments; nothing is typed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from common import RESULTS, cell, load_results, paired, table, values

from fastif_ext import report
from fastif_ext.comparison import Record

PAGE = RESULTS.parent / "experiments.md"
Results = dict[str, Any]
WITHIN = 0.005  # F1 counts as equal to exact influence's when it is not further below


def main() -> None:
    sections = []
    if (RESULTS / "samplers-fashion-mnist.json").is_file():
        sections.append(expectations())
    for prefix, section in SECTIONS:
        found = [load_results(p) | {"path": p} for p in sorted(RESULTS.glob(f"{prefix}-*.json"))]
        if found:
            sections.append(section(found))
    PAGE.write_text(HEAD + "\n\n".join(sections) + "\n")
    print(f"written: {PAGE}")


HEAD = """# Experiments

What holds of "Faithful and Fast Influence Function via Advanced Sampling" (arXiv 2510.26776), and
what does not: class removal in four settings, all samplers side by side. Every table is made by
`bench/experiments/page.py` from the JSON files in `experiments/`; each names the command that made
them, and may be run again: a run that is stopped goes on where it was. Intervals are 95 % bootstrap
intervals over seeds, p values are Wilcoxon's signed-rank test over seeds.

"""


def conditions(r: Results, experiment: str) -> str:
    """One line on what was run where."""
    name = r["path"].stem.removeprefix(f"{experiment}-").partition("-damping-")[0]
    whole = " --whole" if name.endswith("-whole") else ""
    setting = name.removesuffix("-whole")
    damping = f" --damping {r['damping']:g}" if experiment == "samplers" and r["damping"] else ""
    size = f"{r['train_rows']:,} training rows, {r['parameters']:,} parameters moved"
    return (
        f"`python bench/experiments/{experiment}.py --setting {setting}{whole}{damping}`: {size}, "
        f"class {r['class_index']} ({r['class']}) removed, model's test accuracy "
        f"{r['test_accuracy']:.3f}; {r['seeds']} seeds; torch {r['torch']}, {r['device']}, "
        f"{r['threads']} thread(s), {r['build']['cpu']}, {r['date'][:10]}."
    )


def methods(records: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["method"] for r in records if r.get("m") is not None))


def sizes(records: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({r["m"] for r in records if r.get("m") is not None})


# What was expected --------------------------------------------------------------------------------


def expectations() -> str:
    """What this package was expected to reach, each with what was measured."""
    rows = [_near_exact(), *_near_retraining(), *_fast_scores()]
    return "## What was expected\n\n" + table(["expected", "", "measured"], rows)


def _near_exact() -> list[str]:
    records = load_results(RESULTS / "samplers-fashion-mnist.json")["records"]
    exact = values(records, "f1", method="exact influence")[0]
    gaps = {
        name: exact - float(np.mean(values(records, "f1", method=name, m=100)))
        for name in methods(records)
        if values(records, "f1", method=name, m=100)
    }
    ours = all(gaps[n] <= WITHIN for n in gaps if n.startswith("curvature"))
    others = [n for n in ("random", "logit") if n in gaps and gaps[n] > WITHIN]
    holds = "**holds**" if ours and len(others) == 2 else "half holds" if ours else "does not hold"
    words = "below exact influence: " + ", ".join(f"{n} {gap:.4f}" for n, gap in gaps.items())
    if ours and not others:
        words += (
            ". With automatic damping random and logit sampling are as near: each subset gets the "
            "damping that its own spectrum needs, and F1 is saturated. With one damping for all "
            "most subsets are refused, of every sampler (below)"
        )
    return [
        f"Curvature sampling at m = 100 within {WITHIN} F1 of exact influence on Fashion-MNIST's "
        "head, random and logit sampling not",
        holds,
        words,
    ]


def _near_retraining() -> list[list[str]]:
    rows = []
    for path in sorted(RESULTS.glob("large_steps-*.json")):
        r = load_results(path)
        at = {"curvature": "rows that stay", "parts": 2, "method": "curvature-systematic", "m": 400}
        found = values(r["records"], "f1", **at)
        retrained = values(r["records"], "f1", method="retraining")
        if found and retrained:
            gap = retrained[0] - float(np.mean(found))
            rows.append(
                [
                    f"Removal within {WITHIN} F1 of retraining, {r['data']}",
                    "**holds**" if gap <= WITHIN else "does not hold",
                    f"{np.mean(found):.4f}, retraining {retrained[0]:.4f} (remove_class as it "
                    f"comes, 400 rows; {len(found)} seeds)",
                ]
            )
    return rows


def _fast_scores() -> list[list[str]]:
    groups = load_results(RESULTS.parent / "cpu-1-thread.json")["milliseconds"]
    ratios = {
        name.removeprefix("scores "): runs["per-example gradients"]["median"]
        / runs["fastif_ext"]["median"]
        for name, runs in groups.items()
        if name.startswith("scores ")
    }
    fast = sum(x >= 5 for x in ratios.values())
    return [
        [
            "Scores at least 5x faster than per-example gradients",
            "**holds**" if fast == len(ratios) else f"in {fast} of {len(ratios)} cases",
            ", ".join(f"{name}: {x:.1f}x" for name, x in ratios.items())
            + ' (`make bench ARGS="-k scores"`; R test rows; against vmap(grad))',
        ]
    ]


# (a) and (e) -------------------------------------------------------------------------------------


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
        report.plot(as_records, RESULTS / f"{stem}.png", title=title)
        parts += [
            f"### {r['data']}",
            conditions(r, "samplers"),
            f"![{title}](experiments/{stem}.png)",
            *_broken(records),
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


def _broken(records: list[dict[str, Any]]) -> list[str]:
    """A word on runs that were made before remove_class refused steps that break the model."""
    kept = [r["remaining_accuracy"] for r in records if r.get("remaining_accuracy") is not None]
    bad = [r for r in records if r.get("remaining_accuracy", 1.0) < 0.9 * max(kept)]
    if not bad:
        return []
    where = ", ".join(sorted({f"{r['method']} at m = {r['m']}" for r in bad}))
    return [
        f"{len(bad)} runs ended in a broken model ({where}): the class was forgotten only where "
        "the others were, too. They were made before remove_class refused such steps."
    ]


def _one_damping(records: list[dict[str, Any]]) -> str:
    exact = next(r["f1"] for r in records if r["method"] == "exact influence")
    rows = []
    for m in sizes(records):
        for name in methods(records):
            own = [r for r in records if _is(r, name, m)]
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
    from scipy import stats

    better, worse, neither = [], [], []
    for m in sizes(records):
        mine, theirs = (
            {r["seed"]: r[field] for r in records if _is(r, x, m) and r.get(field) is not None}
            for x in (name, other)
        )
        seeds = sorted(mine.keys() & theirs.keys())
        d = sign * np.array([mine[s] - theirs[s] for s in seeds])
        p = 1.0 if len(d) < 6 or not d.any() else float(stats.wilcoxon(d).pvalue)
        group = neither if p >= 0.01 else better if np.median(d) > 0 else worse
        group.append(m)
    holds = len(better) * 2 > len(sizes(records)) and not worse
    return holds, " / ".join(", ".join(map(str, g)) or "-" for g in (better, worse, neither))


def _is(record: dict[str, Any], name: str, m: int) -> bool:
    return record["method"] == name and record.get("m") == m


# (b) ---------------------------------------------------------------------------------------------


def features(found: list[Results]) -> str:
    parts = [
        "## Features: the model's own, or another network's",
        "Feature sampling by nearest rows and by distance, on intrinsic features (the input of the "
        "model's last layer) and extrinsic ones (EfficientNet-Lite0, trained on ImageNet); the "
        "stratified and the systematic curvature sampler beside them.",
    ]
    for r in found:
        records = r["records"]
        rows = [
            [
                m,
                name,
                cell(values(records, "f1", method=name, m=m)),
                cell(values(records, "hvp_error", method=name, m=m)),
                cell(values(records, "ihvp_error", method=name, m=m)),
                f"{np.median(values(records, 'sample_seconds', method=name, m=m)):.3f}",
            ]
            for m in sizes(records)
            for name in methods(records)
        ]
        parts += [
            f"### {r['data']}",
            conditions(r, "features"),
            f"Overhead: the pass for the extrinsic features took {r['extrinsic_seconds']:.0f} s, "
            f"for the model's own logits and features {r['intrinsic_seconds']:.2g} s (CPU "
            "time, one thread). The draw is wall time; extrinsic features have 1,280 columns to "
            "cluster.",
            table(
                ["m", "sampler", "F1", "error of H_S v", "error of iHVP", "draw, s"],
                rows,
            ),
        ]
    return "\n\n".join(parts)


# (c) ---------------------------------------------------------------------------------------------


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


# (d) ---------------------------------------------------------------------------------------------


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


# (f) ---------------------------------------------------------------------------------------------


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


def text_model(found: list[Results]) -> str:
    parts = [
        "## Open question: a transformer on text",
        "Along one direction self-accuracy on the class's training rows falls, then rises again: "
        "the linearisation is left. Far outside, where every prediction is wrong, it falls to 0, "
        "and a search that goes on until the class is forgotten ends there. remove_class refuses "
        "steps that break the other classes and takes a new direction where the first one ends; "
        "the last column counts the runs whose training self-accuracy fell below 1 % in two parts.",
    ]
    for r in found:
        records = r["records"]
        rows = [
            [
                m,
                name,
                *(
                    cell(values(records, field, method=name, m=m))
                    for field in ("f1", "remaining_accuracy", "hvp_error", "ihvp_error")
                ),
                f"{sum(values(records, 'target_reached', method=name, m=m))} of "
                f"{len(values(records, 'target_reached', method=name, m=m))}",
            ]
            for m in sizes(records)
            for name in methods(records)
            if values(records, "f1", method=name, m=m)
        ]
        head = ["m", "sampler", "F1", "rem. acc.", "error of G_S v", "error of iHVP", "reached"]
        parts += [
            r["about"],
            table(head, rows),
        ]
    return "\n\n".join(parts)


def tokens(found: list[Results]) -> str:
    parts = [
        "## A language model: tokens as rows",
        "Thousands of classes, of which few occur in a subset, so the logit samplers draw for the "
        "m most frequent words, one row each, of equal weight: rare words count too much, frequent "
        "ones too little. Curvature sampling gains little over random sampling where the sizes of "
        "most tokens are large; it gains where most rows are confident.",
    ]
    for r in found:
        records = r["records"]
        rows = [
            [
                m,
                name,
                *(
                    cell(values(records, field, method=name, m=m))
                    for field in ("hvp_error", "ihvp_error", "iterations")
                ),
            ]
            for m in sizes(records)
            for name in methods(records)
            if values(records, "hvp_error", method=name, m=m)
        ]
        head = ["m", "sampler", "error of G_S v", "error of iHVP", "iterations"]
        parts += [r["about"], table(head, rows)]
    return "\n\n".join(parts)


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


SECTIONS: Iterable[tuple[str, Callable[[list[Results]], str]]] = (
    ("samplers", samplers),
    ("features", features),
    ("variants", variants),
    ("lissa", lissa),
    ("removal_set", removal_set),
    ("large_steps", large_steps),
    ("text_model", text_model),
    ("tokens", tokens),
    ("preconditioner", preconditioner),
)

if __name__ == "__main__":
    main()
