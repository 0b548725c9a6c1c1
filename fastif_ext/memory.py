"""Memory of the process: freed memory that is used again, and the peak of a stretch of code."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
LARGEST = 31 << 20  # bytes; glibc learns nothing from more than 32 MiB


@functools.cache
def reuse_freed_memory() -> None:
    """Let tensors of up to 31 MiB lie in freed memory, in place of fresh pages from the system.

    glibc hands a large block back to the system when it is freed, until it has seen one of that
    size freed; from then on it keeps such blocks, and up to twice as much (M_MMAP_THRESHOLD in
    mallopt(3)). A single block that nobody writes to teaches it. Fresh pages are a fifth of the
    time of a convolution network's Hessian product, and half that of a forward pass. Thresholds
    that the user has set stay as they are; other allocators take no notice.
    """
    torch.empty(LARGEST, dtype=torch.uint8, device="cpu")


class PeakMemory:
    """Filled when the `with` block ends."""

    megabytes: float | None = None
    """Peak memory above the start of the block; None where the system does not tell."""
    device: str = "cpu"
    """Whose: "cpu", resident memory of the process; "cuda", what torch's allocator gave out."""


@contextmanager
def peak_memory(device: torch.device | None = None) -> Iterator[PeakMemory]:
    """Measure the peak memory that a block adds, on the CPU (Linux; elsewhere None) or a GPU.

    On the CPU, freed memory is first handed back to the system, so that what the block reuses
    counts too. On a GPU the high-water mark is that of torch.cuda.max_memory_allocated: what was
    reserved beyond it, and other libraries' memory, are left out. The mark is set back at the start
    of a block, so blocks must not be nested.

    Args:
        device: whose memory; by default the CPU's.

    Example:
        >>> import torch
        >>> from fastif_ext.memory import peak_memory
        >>> with peak_memory() as peak:
        ...     x = torch.ones(4_000_000)
        >>> peak.megabytes is None or peak.megabytes > 10
        True
    """
    peak = PeakMemory()
    if device is not None and device.type == "cuda":
        peak.device = "cuda"
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.megabytes = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        return
    gc.collect(1)  # recent garbage: to look for all of it takes 0.13 s in a process with torch
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
