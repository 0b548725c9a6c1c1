"""Times all implementations of a job in interleaved rounds.

A machine speeds up and slows down over seconds. pytest-benchmark times one test after the other,
so that two implementations of one job would meet different machines; here they take turns, and each
test then reports the times of its own.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import floors
import pytest
import torch

from fastif_ext.memory import peak_memory

Call = Callable[[], Any]
SHORTEST = 2e-3  # a sample is a mean over as many calls as take this many seconds
SLOW = 3.0  # the first call of what takes longer counts already
MINUTE = 60.0  # a round that takes longer is made once


@dataclass
class Job:
    """The same work, done in several ways."""

    calls: Mapping[str, Call]
    """The implementations. One that calls pytest.skip at its first call is left out."""
    work: floors.Work | None = None
    """What any of them must do at the least."""
    error: Callable[[Any], float] | None = None
    """Of what a call returns."""

    def only(self, names: Collection[str]) -> Job:
        """The job without the other implementations."""
        return replace(self, calls={k: v for k, v in self.calls.items() if k in names})


@dataclass
class Measured:
    """What was seen of one implementation."""

    seconds: list[float] = field(default_factory=list)
    """Of a call, one number for each round."""
    extra_bytes: int | None = None
    """Peak memory of the first call, above what was there before; it holds the result."""
    error: float | None = None
    """Of the first call's result, as the job defines it."""
    skipped: str | None = None
    """Why it did not run."""


class Replay:
    """A clock that stands at what was measured, to hand it to pytest-benchmark."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now

    def play(self, seconds: list[float]) -> Callable[[], None]:
        """A function whose calls take, by this clock, what is listed."""
        left: Iterator[float] = iter(seconds)

        def step() -> None:
            self.now += next(left)

        return step


def measure(job: Job, *, device: str, budget: float) -> dict[str, Measured]:
    """First calls one by one, for memory and error; then rounds, in each of which all have a turn.

    Args:
        job: what to time.
        device: "cpu" or "cuda".
        budget: seconds for the rounds; there are at least 3 and at most 25 of them, one where it
            takes more than a minute.
    """
    found = {name: Measured() for name in job.calls}
    repeats: dict[str, int] = {}
    taken = 0.0
    for name, call in job.calls.items():
        try:
            seconds = _first(call, found[name], device, job.error)
        except pytest.skip.Exception as skipped:
            found[name].skipped = str(skipped)
            continue
        repeats[name] = max(1, min(1000, int(SHORTEST / seconds)))
        taken += seconds
        if seconds > SLOW:
            found[name].seconds.append(seconds)
    end, order = time.perf_counter() + budget, list(repeats)
    least = 3 if taken < MINUTE else 1
    for turn in range(25):
        if turn >= least and time.perf_counter() > end:
            break
        for name in order:
            found[name].seconds.append(_seconds(job.calls[name], repeats[name], device))
        order = order[1:] + order[:1]
    return found


def _first(call: Call, found: Measured, device: str, error: Callable[[Any], float] | None) -> float:
    """Fills in memory and error; seconds of the last call made."""
    for _ in range(2):
        with peak_memory(torch.device(device)) as peak:
            start = time.perf_counter()
            result = call()
            _wait(device)
            seconds = time.perf_counter() - start
        if seconds > SLOW:
            break
        seconds = _seconds(call, 1, device)  # the first one compiled, loaded, planned
    if peak.megabytes is not None:
        found.extra_bytes = int(peak.megabytes * 2**20)
    if error is not None:
        found.error = float(error(result))
    return seconds


def _seconds(call: Call, repeats: int, device: str) -> float:
    gc.disable()
    try:
        _wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        _wait(device)
        return (time.perf_counter() - start) / repeats
    finally:
        gc.enable()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
