"""Peak memory of a stretch of code."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


class PeakMemory:
    """Filled when the `with` block ends."""

    megabytes: float | None = None
    """Peak resident memory above the start of the block; None where the system does not tell."""


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure the peak resident memory that a block adds (Linux; elsewhere None).

    Freed memory is first handed back to the system, so that what the block reuses counts too.

    Example:
        >>> import torch
        >>> from fastif_ext.memory import peak_memory
        >>> with peak_memory() as peak:
        ...     x = torch.ones(4_000_000)
        >>> peak.megabytes is None or peak.megabytes > 10
        True
    """
    peak = PeakMemory()
    gc.collect()
    start = None
    try:
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text("5")  # sets the high-water mark back to what is resident now
        start = _resident("VmRSS")
    except (OSError, AttributeError):
        pass
    yield peak
    if start is not None:
        peak.megabytes = max(0.0, (_resident("VmHWM") - start) / 1024)


def _resident(key: str) -> int:
    """A line of /proc/self/status, in kilobytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise OSError(f"{STATUS} has no {key}")
