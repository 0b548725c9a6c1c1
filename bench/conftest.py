"""Options and helpers of the benchmarks.

    make bench                                        # everything, one thread
    make bench ARGS="--threads 2 -k kmeans"           # a part, on two threads
    make bench ARGS="--device cuda"                   # on a GPU, in the sizes of one

Within a group all implementations do the same job on the same data; compare their medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import floors
import pytest
import torch

from fastif_ext.memory import peak_memory


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="torch's intra-op threads")
    parser.addoption("--scale", type=float, default=1.0, help="multiplies the number of rows")
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu")


def synchronized() -> float:
    """The clock, once the GPU is idle."""
    torch.cuda.synchronize()
    return time.perf_counter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cuda":
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=synchronized))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    chosen = request.config.getoption("--device")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: torch sees no GPU", returncode=2)
    return chosen


@pytest.fixture
def here(device: str) -> Callable[[tuple], tuple]:
    """The sizes of a case, if they are this device's."""

    def sizes(case: tuple) -> tuple:
        if case[0] != device:
            pytest.skip(f"a size for {case[0]}")
        return case[1:]

    return sizes


@pytest.fixture(scope="session")
def roofs(request: pytest.FixtureRequest, device: str) -> floors.Roofs:
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    found = floors.measure(device)
    torch.set_num_threads(before)
    return found


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same data for every implementation."""
    torch.manual_seed(0)


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """The number of rows of a case, scaled by --scale."""
    scale = request.config.getoption("--scale")
    return lambda n: max(16, int(n * scale))


@pytest.fixture
def timed(benchmark: Any, device: str, roofs: floors.Roofs) -> Callable[..., None]:
    """Times a call: warm-ups, then rounds of as many calls as take a few milliseconds."""

    def run(group: str, function: Callable[[], Any], work: floors.Work | None = None) -> None:
        gpu = device == "cuda"
        benchmark.group = group
        facts = benchmark.extra_info
        facts["threads"] = torch.get_num_threads()
        facts["torch"] = torch.__version__
        facts["device"] = torch.cuda.get_device_name() if gpu else "cpu"
        facts["copy_bytes_per_second"] = roofs.bytes_per_second
        facts["flops_per_second"] = roofs.flops_per_second
        if work is not None:
            facts["floor_seconds"] = roofs.seconds(work)
        function()
        calls = 1
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start = synchronized()
            function()
            seconds = synchronized() - start
            facts["extra_bytes"] = torch.cuda.max_memory_allocated() - before
            calls = max(1, min(1000, int(5e-3 / seconds)))
        else:
            with peak_memory() as peak:
                function()
            if peak.megabytes is not None:
                facts["extra_bytes"] = int(peak.megabytes * 2**20)
        benchmark.pedantic(function, rounds=15 if gpu else 5, iterations=calls, warmup_rounds=1)

    return run
