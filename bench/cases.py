"""What the benchmarks share: sizes by device, strongest torch.compile, errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

Sizes = tuple[int, ...]


def cases(table: Mapping[str, Sequence[Sizes]], *dtypes: str) -> list[object]:
    """Parameters for every device's sizes; the fixture `here` skips those of other devices.

    They go from launch-bound over cache-sized and memory-bound to large. With dtypes each case
    ends with one of them.
    """
    found = [
        (device, *sizes, *dtype)
        for device, all_sizes in table.items()
        for sizes in all_sizes
        for dtype in ([(name,) for name in dtypes] or [()])
    ]
    return [pytest.param(case, id="-".join(map(str, case))) for case in found]


def titled(what: str, dtype: str) -> str:
    """The beginning of a group's name; float32 goes without saying."""
    return what if dtype == "float32" else f"{what} {dtype}"


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """torch.compile in its strongest form that can be compared call by call."""
    torch.compiler.reset()
    return torch.compile(function, mode="max-autotune-no-cudagraphs")


def relative_error(found: Tensor, want: Tensor) -> float:
    """|found - want| / |want|, in float64."""
    return float((found.double() - want.double()).norm() / want.double().norm())
