"""What depends on the device: kernels, random state, precision, memory that runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastif_ext.build import build_info

DEVICES = ("cpu", "cuda", "auto")
KERNELS = ("cpu", "cuda") if build_info()["cuda"] else ("cpu",)  # where the operators run
LOOK_EVERY = 8  # steps of a solver between two looks at its residual, off the CPU


def choose_device(name: str) -> torch.device:
    """The device of that name: "cpu", "cuda", or "auto", CUDA where there is everything it takes.

    Args:
        name: one of DEVICES.

    Raises:
        ValueError: an unknown name; "cuda" without a GPU, or without CUDA kernels in this build.

    Example:
        >>> from fastif_ext.device import choose_device
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if name not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}; got {name!r}")
    missing = _missing_for_cuda()
    if name == "cuda" and missing:
        raise ValueError(f"device 'cuda' cannot be used: {missing}. Use 'cpu' or 'auto'")
    return torch.device("cpu" if name == "cpu" or missing else "cuda")


def _missing_for_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device (torch.cuda.is_available() is false)"
    if "cuda" not in KERNELS:
        reason = build_info().get("cuda_reason") or "it was built for the CPU"
        return f"this build of fastif_ext has no CUDA kernels ({reason})"
    return None


def with_kernels(t: Tensor) -> Tensor:
    """The tensor itself, or a copy on the CPU where this build has no kernels for its device."""
    return t if t.device.type in KERNELS else t.cpu()


def look_every(device: torch.device) -> int:
    """After how many steps a solver looks at its residual, by default.

    On the CPU a look is free. Elsewhere it makes the host wait for the device, and the device then
    for the host, once per look.
    """
    return 1 if device.type == "cpu" else LOOK_EVERY


@contextmanager
def kept_rng(device: torch.device) -> Iterator[None]:
    """Torch's global random state, of the CPU and of the device, as before at the end."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        yield


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Arithmetic in the tensors' own dtype: no ambient autocast, no TF32 in convolutions.

    It comes out the same twice, too: of cuDNN's algorithms those run that add up in one order. TF32
    keeps 10 bits of what goes into a product, so that a residual of 1e-3 is out of reach; torch has
    it on for convolutions and off for matrix products. Who allows it for the latter (see
    torch.set_float32_matmul_precision) gets it for both.
    """
    cuda = device.type == "cuda"
    with (
        _ieee_convolutions() if cuda else nullcontext(),
        _repeatable_convolutions() if cuda else nullcontext(),
    ):
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield


@contextmanager
def _repeatable_convolutions() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def _ieee_convolutions() -> Iterator[None]:
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    try:
        allowed = cudnn.allow_tf32
    except RuntimeError:  # conv and rnn differ: set by the newer names, which alone are put back
        allowed = None
    cudnn.allow_tf32 = False  # by the older name: it can be read by both
    try:
        yield
    finally:
        if allowed is not None:
            cudnn.allow_tf32 = allowed
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """Where the device's memory runs out in the block, say on what, and what to do about it.

    Raises:
        torch.OutOfMemoryError: from the allocator's own, which is its __cause__.

    Example:
        >>> import torch
        >>> from fastif_ext.device import memory_for
        >>> with memory_for("a batch of 512 rows", "use a smaller batch_size"):
        ...     raise torch.OutOfMemoryError("CUDA out of memory.")
        Traceback (most recent call last):
        ...
        torch.OutOfMemoryError: out of memory for a batch of 512 rows: use a smaller batch_size
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if error.__cause__ is not None:  # said already, nearer to where it happened
            raise
        raise torch.OutOfMemoryError(f"out of memory for {what}: {remedy}") from error
