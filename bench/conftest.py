"""Options and fixtures of the benchmarks.

    make bench                                        # everything, one thread
    make bench ARGS="--threads 2 -k kmeans"           # a part, on two threads
    make bench ARGS="--long"                          # and what takes minutes: a CNN, class removal
    make bench ARGS="--device cuda"                   # on a GPU, in the sizes of one

Within a group all implementations do the same job on the same data, in interleaved rounds; compare
their medians.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import floors
import pytest
import torch
from rounds import Job, Measured, Replay, measure

REPLAY = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="torch's intra-op threads")
    parser.addoption("--scale", type=float, default=1.0, help="multiplies the number of rows")
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu")
    parser.addoption("--seconds", type=float, default=4.0, help="of rounds, for each group")
    parser.addoption("--long", action="store_true", help="also run what takes minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes minutes; runs with --long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: --long runs it"))


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
    torch.manual_seed(0)


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """The number of rows of a case, scaled by --scale."""
    scale = request.config.getoption("--scale")
    return lambda n: max(16, int(n * scale))


@pytest.fixture(scope="session")
def measured() -> dict[str, tuple[float | None, dict[str, Measured]]]:
    """By group: the floor in seconds, and what was seen of each implementation."""
    return {}


def _asked_for(request: pytest.FixtureRequest) -> set[str]:
    """The implementations of this job that are to run in this session."""
    return {
        item.callspec.params["name"]
        for item in request.session.items
        if item.originalname == request.node.originalname and item.path == request.node.path
    }


@pytest.fixture
def compare(
    request: pytest.FixtureRequest,
    benchmark: Any,
    device: str,
    roofs: floors.Roofs,
    measured: dict[str, tuple[float | None, dict[str, Measured]]],
) -> Callable[..., None]:
    """Reports one implementation of a job; the first of a group has all of them timed."""

    def report(name: str, group: str, prepare: Callable[[], Job]) -> None:
        if group not in measured:
            job = prepare().only(_asked_for(request))
            floor = None if job.work is None else roofs.seconds(job.work)
            budget = request.config.getoption("--seconds")
            measured[group] = floor, measure(job, device=device, budget=budget)
        floor, found = measured[group][0], measured[group][1][name]
        if found.skipped is not None:
            pytest.skip(found.skipped)
        benchmark.group = group
        facts = benchmark.extra_info
        facts["threads"] = torch.get_num_threads()
        facts["torch"] = torch.__version__
        facts["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        facts["copy_bytes_per_second"] = roofs.bytes_per_second
        facts["flops_per_second"] = roofs.flops_per_second
        facts["extra_bytes"] = found.extra_bytes
        facts["error"] = found.error
        facts["floor_seconds"] = floor
        benchmark.pedantic(REPLAY.play(found.seconds), rounds=len(found.seconds))

    return report
