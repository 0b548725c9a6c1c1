"""Options and helpers of the benchmarks.

    make bench                                        # everything, one thread
    make bench ARGS="--threads 2 -k kmeans"           # a part, on two threads

Within a group all implementations do the same job on the same data; compare their medians.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="torch's intra-op threads")
    parser.addoption("--scale", type=float, default=1.0, help="multiplies the number of rows")


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """The number of rows of a case, scaled by --scale."""
    scale = request.config.getoption("--scale")
    return lambda n: max(16, int(n * scale))


@pytest.fixture
def timed(benchmark: Any) -> Callable[..., None]:
    """Times a call: one warm-up, then at least five rounds within about two seconds."""

    def run(group: str, function: Callable[[], Any]) -> None:
        benchmark.group = group
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["torch"] = torch.__version__
        benchmark.pedantic(function, rounds=5, iterations=1, warmup_rounds=1)

    return run
