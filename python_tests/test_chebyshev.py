"""The weights of Chebyshev's semi-iteration against the polynomial they are to make."""

from __future__ import annotations

import pytest
import torch

from fastif_ext.chebyshev import Chebyshev


@pytest.mark.parametrize(("lowest", "scale"), [(0.1, 3.0), (1.0, 1.5), (2.0, 2.0), (3.0, 2.0)])
def test_the_error_is_chebyshevs_polynomial(lowest: float, scale: float) -> None:
    """After k steps the error at eigenvalue a is T_k((scale - a) / d) / T_k(scale / d) of it."""
    values = torch.linspace(lowest, max(2 * scale - lowest, lowest), 50, dtype=torch.float64)
    error = torch.ones_like(values)
    steps = Chebyshev(lowest, scale, error)
    half = max(scale - lowest, 0.0)
    for k in range(1, 9):
        steps.remember(error)
        error -= values * error / scale
        steps.accelerate_(error)
        if half == 0:
            torch.testing.assert_close(error, (1 - values / scale) ** k)
            continue
        at_zero = torch.special.chebyshev_polynomial_t(
            torch.tensor(scale / half, dtype=torch.float64), k
        )
        want = torch.special.chebyshev_polynomial_t((scale - values) / half, k) / at_zero
        torch.testing.assert_close(error, want, rtol=1e-9, atol=1e-12)
