"""What the benchmarks share: sizes by device, strongest torch.compile, errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

Sizes = tuple[int, ...]


def cases(table: Mapping[str, Sequence[Sizes]]) -> list[object]:
    """Parameters for every device's sizes; the fixture `here` skips those of other devices.

    They go from launch-bound over cache-sized and memory-bound to large.
    """
    return [
        pytest.param((device, *sizes), id="-".join(map(str, (device, *sizes))))
        for device, all_sizes in table.items()
        for sizes in all_sizes
    ]


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """torch.compile in its strongest form that can be compared call by call."""
    torch.compiler.reset()
    return torch.compile(function, mode="max-autotune-no-cudagraphs")


def relative_error(found: Tensor, want: Tensor) -> float:
    """|found - want| / |want|, in float64."""
    return float((found.double() - want.double()).norm() / want.double().norm())
