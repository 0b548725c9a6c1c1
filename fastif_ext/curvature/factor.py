"""The rows that matter most in A, where A^T A is a Gauss-Newton matrix of softmax cross-entropy.

The matrix is sum_i J_i^T S_i J_i with J_i the Jacobian of example i's logits and
S_i = w_i (diag(p_i) - p_i p_i^T). Few directions s of an example's logits make up most of S_i: its
two likeliest classes give one. Steps of Cholesky's decomposition with the largest pivot first find
them, S_i = sum_k s_k s_k^T, and each gives the row J_i^T s_k. A row takes a backward pass through
one example, a product with the matrix one through all: the rows are cheap.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastif_ext.preconditioner import LowRankPreconditioner

PIVOTS = 4  # directions of an example that are looked at
LEAST_SHARE = 0.25  # of the trace of all S_i; rows that stand for less are no use
LEAST_WORK = 1 << 23  # n p R below which a product takes less time than finding rows
MOST_EXAMPLES = 4000  # of more, a few rows hardly stand for a quarter
LEAST_ROWS, MOST_ROWS = 16, 100
MEMORY = 1 << 26  # numbers that the rows may take


class OutputDirections(NamedTuple):
    """Directions in the outputs of some examples."""

    rows: Tensor
    """The examples, int64 [r]."""
    directions: Tensor
    """[r, C]"""


def output_directions(probs: Tensor, weights: Tensor, count: int) -> OutputDirections | None:
    """The `count` largest directions s of all examples; None where they stand for too little.

    Args:
        probs: softmax of the logits, [n, C].
        weights: one per example, [n]; none is negative.
        count: how many.
    """
    left = weights[:, None] * (probs - probs.square())  # the diagonal of what is not yet found
    total = left.sum()
    found: list[Tensor] = []
    for _ in range(min(PIVOTS, probs.shape[1] - 1)):
        pivot, place = left.max(1, keepdim=True)
        column = -(weights[:, None] * probs) * probs.gather(1, place)
        column = column.scatter_add(1, place, weights[:, None] * probs.gather(1, place))
        for s in found:
            column -= s * s.gather(1, place)
        s = torch.where(pivot > 0, column / pivot.clamp(min=1e-30).sqrt(), 0.0)
        left = (left - s.square()).clamp_(min=0)
        found.append(s)
    if not found:
        return None
    directions = torch.stack(found).flatten(0, 1)
    size = directions.square().sum(1)
    largest = size.topk(min(count, len(size)))
    if not float(largest.values.sum()) >= LEAST_SHARE * float(total):
        return None
    return OutputDirections(largest.indices % len(probs), directions[largest.indices])


def rows_worth_taking(examples: int, parameters: int, right_hand_sides: int) -> int:
    """How many rows save a solver more time than they take; 0 for none.

    A A^T takes 2 r^2 p operations and a product with a dense network's Hessian about 12 n p R, of
    which the rows save several: r^2 <= 18 n R makes them cost as much as three.
    """
    if examples * parameters * right_hand_sides < LEAST_WORK or examples > MOST_EXAMPLES:
        return 0
    count = min(MOST_ROWS, math.isqrt(18 * examples * right_hand_sides), MEMORY // parameters)
    return count if count >= LEAST_ROWS else 0


def preconditioner_of(rows: Tensor | None, damping: float) -> LowRankPreconditioner | None:
    """That of the rows; None without any, or where it would be rounding error in large directions.

    Args:
        rows: A, [r, p].
        damping: positive.
    """
    if rows is None:
        return None
    M = LowRankPreconditioner(rows, damping)
    return M if damping >= 1e3 * torch.finfo(rows.dtype).eps * M.trace else None
