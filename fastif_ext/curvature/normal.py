"""The normal equations of a damped Hessian's columns: the operator of generalised influence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastif_ext.curvature.operator import check_vector
from fastif_ext.parameters import Selection


class NormalEquations:
    """``A^T A`` for ``A = (H + damping I)[:, T]``, the columns of the selected parameters T.

    Positive semi-definite whatever the sign of H's eigenvalues; its condition number is the square
    of A's. A product takes two products with H.

    Args:
        H: symmetric operator on all trainable parameters, with ``H @ v`` for v [R, total].
        selection: the parameters T.
        damping: added to H's diagonal.

    Example:
        >>> import torch
        >>> from fastif_ext.curvature import NormalEquations
        >>> from fastif_ext.parameters import Selection
        >>> H = torch.tensor([[1.0, 2.0], [2.0, -3.0]])
        >>> model = torch.nn.Linear(1, 1)
        >>> N = NormalEquations(H, Selection(model, ["weight"]), damping=0.0)
        >>> N @ torch.tensor([1.0])  # 1^2 + 2^2
        tensor([5.])
    """

    def __init__(self, H: Any, selection: Selection, *, damping: float) -> None:
        self.H, self.selection, self.damping = H, selection, damping
        self.dim = selection.dim
        self.recordable = bool(getattr(H, "recordable", False))  # see fastif_ext.graphs

    def renew(self) -> None:
        """Drop what H keeps of a stream."""
        if self.recordable:
            self.H.renew()

    def adjoint(self, b: Tensor) -> Tensor:
        """A^T b, [R, dim], for b [R, total]: the right-hand side that belongs to b."""
        return self.selection.restrict(self._damped(b))

    def __matmul__(self, v: Tensor) -> Tensor:
        """A^T A v for v of shape [dim] or [R, dim]."""
        check_vector(v, self.dim, v.dtype, v.device)
        batch = v if v.dim() == 2 else v[None]
        product = self.adjoint(self._damped(self.selection.embed(batch)))
        return product if v.dim() == 2 else product[0]

    def _damped(self, v: Tensor) -> Tensor:
        product = v @ self.H if isinstance(self.H, Tensor) else self.H @ v
        return product + self.damping * v
