"""Physical floors: the least traffic and arithmetic of each job, and what the machine can do.

A job cannot be done faster than its bytes cross memory (every input read once, every output
written once) and its arithmetic goes through the unit that does it. Both rates are measured here,
by torch: a large copy and a large matrix product.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Work:
    """What a job must do."""

    bytes: float
    flops: float = 0.0
    unit: str = "fp32"
    """The arithmetic it may use: fp32, tf32, bf16 or fp16."""


@dataclass(frozen=True)
class Roofs:
    """What a machine can do, as measured."""

    bytes_per_second: float
    flops_per_second: dict[str, float]

    def seconds(self, work: Work) -> float:
        """No implementation can be faster."""
        arithmetic = work.flops / self.flops_per_second.get(
            work.unit, self.flops_per_second["fp32"]
        )
        return max(work.bytes / self.bytes_per_second, arithmetic)


def lissa_update(p: int, R: int, *, item: int = 4, product: int = 4) -> Work:
    """Reads h, v and the product, writes h."""
    return Work(R * p * (3 * item + product), 7.0 * R * p)


def hvp_accumulate(p: int, R: int, *, item: int = 4, product: int = 4) -> Work:
    """Reads the sum and the product, writes the sum."""
    return Work(R * p * (2 * item + product), 2.0 * R * p)


def softmax_hvp(n: int, C: int, R: int, *, item: int = 4) -> Work:
    """Reads probs once and z, writes u."""
    return Work(n * C * (item + R * (item + 4)), 5.0 * n * C * R)


def linear_softmax_hvp(n: int, d: int, C: int, R: int, *, item: int = 4) -> Work:
    """Two products of n x d with d x RC; reads x once."""
    return Work(n * (d + C) * item + 2 * R * C * d * 4, 4.0 * n * d * R * C)


def kmeans_assign(n: int, d: int, K: int, *, item: int = 4, unit: str = "fp32") -> Work:
    """A product of n x d with d x K; reads x, writes labels and distances."""
    return Work(n * (d * item + 12) + K * d * item, 2.0 * n * K * d, unit)


def kmeans_update(n: int, d: int, K: int, *, item: int = 4) -> Work:
    """Reads x and labels, writes sums."""
    return Work(n * (d * item + 8) + K * d * 4, float(n * d))


def read_logits(n: int, Y: int, *, item: int = 4) -> Work:
    """One look at every logit: the samplers."""
    return Work(float(n * Y * item))


def measure(device: str) -> Roofs:
    """The roofs of a device; on the CPU of as many threads as torch is set to."""
    gpu = device.startswith("cuda")
    rate = _copy_rate(device, 1 << (30 if gpu else 26))
    size = 8192 if gpu else 1024
    units = ["fp32", "tf32", "bf16", "fp16"] if gpu else ["fp32"]
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    flops = {}
    before = torch.backends.cuda.matmul.allow_tf32
    for unit in units:
        torch.backends.cuda.matmul.allow_tf32 = unit == "tf32"
        m = torch.randn(size, size, device=device).to(dtypes.get(unit, torch.float32))
        flops[unit] = 2.0 * size**3 / _seconds(lambda m=m: m @ m, device)
    torch.backends.cuda.matmul.allow_tf32 = before
    return Roofs(rate, flops)


def _copy_rate(device: str, count: int) -> float:
    """Bytes read and written per second."""
    a = torch.empty(count, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() * a.element_size() / _seconds(lambda: b.copy_(a), device)


def _seconds(call: Callable[[], object], device: str) -> float:
    """The best of ten: a roof is what the machine can do."""
    times = []
    for _ in range(10):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
