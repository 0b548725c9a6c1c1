"""Which rows the curvature of an edit is taken on, anew at every linearisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastif_ext.extract import Extracted
from fastif_ext.samplers import CurvatureSampler, SubsetSampler

Chooser = SubsetSampler | Callable[[Extracted, int], SubsetSampler] | None


def curvature_subset(
    sampler: Chooser,
    logits: Tensor,
    labels: Tensor,
    kept: Tensor,
    *,
    samples: int,
    step: int,
    seed: int,
) -> SubsetSampler:
    """Rows of the training set, none outside `kept`, weighted for the mean over `kept`.

    Args:
        sampler: None, a fresh systematic CurvatureSampler; a callable that chooses among the kept
            rows, given their logits and labels and the number of the step; or a fixed sampler of
            rows of the whole set, of which the others are left out and the weights scaled up.
        logits: [n, Y], at the current parameters.
        labels: int64 [n].
        kept: the rows that stay, int64.
        samples: how many rows the fresh sampler draws at most.
        step: number of the linearisation.
        seed: of the fresh sampler.
    """
    n = len(logits)
    if isinstance(sampler, SubsetSampler) or hasattr(sampler, "indices"):
        fixed: Any = sampler
        rows = fixed.indices.cpu()
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < n:
            raise ValueError(
                f"sampler.indices must lie in [0, {n}), the rows of train; got "
                f"{int(rows.min())} to {int(rows.max())}"
            )
        stays = torch.zeros(n, dtype=torch.bool)
        stays[kept] = True
        chosen = stays[rows]
        if not chosen.any():
            raise ValueError("sampler has no row outside the removed ones; draw more rows")
        weights = fixed.weights.cpu()[chosen] * (n / len(kept))
        return SubsetSampler(n, rows[chosen], weights)
    among = Extracted(logits[kept], None, labels[kept])
    if sampler is None:
        m = min(samples, len(kept))
        drawn: Any = CurvatureSampler(among.logits, m, method="systematic", seed=seed + step)
    else:
        drawn = sampler(among, step)
        if not (hasattr(drawn, "indices") and hasattr(drawn, "weights")):
            raise TypeError(
                f"sampler(extracted, step) must return a sampler with .indices and .weights, got a "
                f"{type(drawn).__name__}"
            )
    return SubsetSampler(n, kept[drawn.indices.cpu()], drawn.weights)
