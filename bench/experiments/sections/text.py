"""(f): a transformer on text; tokens as rows."""

from __future__ import annotations

from common import cell, table, values

from sections.runs import Results, methods, sizes


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
