"""A preconditioner for conjugate gradients: the inverse of a low-rank matrix plus damping."""

from __future__ import annotations

import torch
from torch import Tensor


class LowRankPreconditioner:
    """M = (A^T A + damping I)^-1 for a few rows A [r, p], with ``M @ v``.

    Where A^T A is the larger part of a matrix H, M (H + damping I) is close to the identity and
    conjugate gradients take few steps. By Woodbury's identity a product takes two products with A,
    and memory for A alone: M v = (v - A^T (A A^T + damping I)^-1 A v) / damping.

    Args:
        rows: A, [r, p].
        damping: positive.

    Attributes:
        trace: of A^T A, which bounds its largest eigenvalue.

    Raises:
        ValueError: damping that is not positive.

    Example:
        >>> import torch
        >>> from fastif_ext.preconditioner import LowRankPreconditioner
        >>> M = LowRankPreconditioner(torch.tensor([[3.0, 0.0]]), damping=1.0)
        >>> M @ torch.tensor([[10.0, 1.0]])
        tensor([[1., 1.]])
    """

    def __init__(self, rows: Tensor, damping: float) -> None:
        if not damping > 0:
            raise ValueError(f"LowRankPreconditioner: damping must be positive, got {damping}")
        gram = (rows @ rows.T).double()
        self.trace = float(gram.trace())
        gram.diagonal().add_(damping)
        self._rows, self._inverse = rows, torch.linalg.inv(gram).to(rows.dtype)
        self._damping = damping

    def __matmul__(self, v: Tensor) -> Tensor:
        """M v for v [R, p]."""
        inside = (v @ self._rows.T) @ self._inverse
        return torch.addmm(v, inside, self._rows, alpha=-1).mul_(1 / self._damping)
