"""Errors of sampling on a GPU, whose kernels do not wait to be asked whether values were good.

They mark their results. These functions look at the mark, which does wait, and raise what the
operators raise on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_logits(op: str, logits: Tensor, mark: Tensor) -> None:
    """mark: -(1 + row) for the first row that cannot be used, else not negative."""
    row = -1 - int(mark)
    if row < 0:
        return
    if bool((logits[row] == torch.inf).any() & ~logits[row].isnan().any()):
        raise RuntimeError(
            f"fastif_ext::{op}: logits has +inf in row {row}; clamp the logits or repair the model "
            f"that made them"
        )
    raise RuntimeError(
        f"fastif_ext::{op}: row_scale (and the size it gives) must be finite and not negative; "
        f"row {row} is not"
    )


def check_sizes(op: str, logits: Tensor, sizes: Tensor) -> None:
    """NaN is the size of a row that cannot be used."""
    bad = sizes.isnan()
    if bool(bad.any()):
        check_logits(op, logits, -1 - bad.nonzero()[0, 0])


def check_weights(op: str, lines: Tensor, log_threshold: Tensor) -> None:
    """log_threshold is NaN where a weight was invalid."""
    if not bool(log_threshold.isnan().any()):
        return
    line, position = (~((lines >= 0) & (lines < torch.inf))).nonzero()[0].tolist()
    raise RuntimeError(
        f"fastif_ext::{op}: weights must be finite and not negative; line {line}, position "
        f"{position} is not"
    )


def check_enough(rows: Tensor) -> None:
    """Every line must have as many positive weights as draws."""
    short = (rows[:, -1] < 0).nonzero()[:, 0].tolist()
    if short:
        raise RuntimeError(
            f"fastif_ext::bottom_k: line {short[0]} of weights has fewer positive weights than the "
            f"{rows.shape[1]} draws asked for"
        )
