"""A weighted sampler for data sets of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from fastif_ext.ops.sampling import multinomial


class WeightedRandomSampler(Sampler[int]):
    """Call-compatible with torch.utils.data.WeightedRandomSampler, for more than 2^24 rows.

    torch's own refuses more than 2^24 weights and can draw a row of weight zero. Every pass draws
    anew, as `multinomial` does, with a seed taken from `generator`.

    Args:
        weights: one weight per row, finite and not negative, with any sum. A floating-point tensor
            is used as it is; anything else is made float64.
        num_samples: draws per pass.
        replacement: whether a row may be drawn again in one pass.
        generator: source of the seed; torch's default generator if None.

    Raises:
        TypeError, ValueError: a weight shape, count or flag that does not fit.

    Example:
        >>> import fastif_ext as fi
        >>> list(fi.WeightedRandomSampler([0.0, 1.0, 0.0], 3))
        [1, 1, 1]
    """

    draws_rows = True  # see fastif_ext.loaders.check_loader

    def __init__(
        self,
        weights: Sequence[float] | Tensor,
        num_samples: int,
        replacement: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples <= 0:
            raise ValueError(f"num_samples must be a positive int, got {num_samples!r}")
        if not isinstance(replacement, bool):
            raise ValueError(f"replacement must be a bool, got {replacement!r}")
        if not (isinstance(weights, Tensor) and weights.is_floating_point()):
            weights = torch.as_tensor(weights, dtype=torch.float64)
        if weights.dim() != 1:
            raise ValueError(f"weights must be 1-D, got shape {list(weights.shape)}")
        self.weights = weights
        self.num_samples = num_samples
        self.replacement = replacement
        self.generator = generator

    def __iter__(self) -> Iterator[int]:
        rows = multinomial(
            self.weights, self.num_samples, self.replacement, generator=self.generator
        )
        return iter(rows.tolist())

    def __len__(self) -> int:
        return self.num_samples
