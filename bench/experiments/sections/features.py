"""(b): the model's own features, or another network's."""

from __future__ import annotations

import numpy as np
from common import cell, table, values

from sections.runs import Results, conditions, methods, sizes


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
