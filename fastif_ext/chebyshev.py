"""Chebyshev's semi-iteration: a linear recursion accelerated by knowledge of its spectrum."""

from __future__ import annotations

import torch
from torch import Tensor


class Chebyshev:
    """Turns the steps of h <- G h + c into those of Chebyshev's semi-iteration, in place.

    For a step that contracts by 1 - lambda / scale on eigenvectors with lambda in
    [lowest, 2 scale - lowest], h_{k+1} = w_k (step from h_k) + (1 - w_k) h_{k-1} with

        w_1 = 1,  w_2 = 1 / (1 - r / 2),  w_{k+1} = 1 / (1 - r w_k / 4),  r = (1 - lowest / scale)^2

    has after k steps the smallest largest error over that interval that any choice of weights has
    (Golub and Varga 1961). Eigenvalues between 0 and `lowest` converge too, more slowly.

    Args:
        lowest: lower end of the interval, positive.
        scale: its midpoint.
        h: a tensor like the iterate, for shapes.

    Example:
        >>> import torch
        >>> from fastif_ext.chebyshev import Chebyshev
        >>> a, b = torch.tensor([1.0, 100.0]), torch.ones(2)
        >>> x = torch.zeros(2)
        >>> steps = Chebyshev(1.0, 50.5, x)
        >>> for _ in range(60):
        ...     steps.remember(x)
        ...     x += (b - a * x) / 50.5
        ...     steps.accelerate_(x)
        >>> bool((a * x - b).norm() < 1e-4)
        True
    """

    def __init__(self, lowest: float, scale: float, h: Tensor) -> None:
        self.r = max(0.0, 1 - lowest / scale) ** 2
        self.weight: float | None = None
        self.now, self.before = torch.empty_like(h), torch.empty_like(h)

    def remember(self, h: Tensor) -> None:
        """Before a step: keep the iterate."""
        self.before, self.now = self.now, self.before.copy_(h)

    def accelerate_(self, h: Tensor) -> None:
        """After the step: h becomes the accelerated iterate."""
        if self.weight is None:
            self.weight = 2.0  # the first step stays as it is; in the recurrence it counts as this
            return
        self.weight = 1 / (1 - self.r * self.weight / 4)
        torch.lerp(self.before, h, self.weight, out=h)
