"""The cost model: constants of a machine, a job, and the formulas that bring them together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fastif_ext.data import BATCH

K = 10  # rows per class of the logit sampler
VECTORS = 5  # of length p that cg and the sum of a product hold


@dataclass
class Machine:
    """The constants of one rank's machine."""

    how: str
    batch: float
    """Seconds per batch beside what follows."""
    flop: float
    """Seconds per flop of the forward pass."""
    logit: float
    """Seconds per logit: both samplers."""
    draw: float
    """Seconds per row to draw from the sizes, on rank 0 alone."""
    product: float
    """Seconds per product beside its flops."""
    product_flop: float
    """Seconds per flop of a product, of which there are 4 forward passes' worth."""
    meeting: float
    """Seconds per meeting of ranks."""
    wire: float
    """Seconds per byte of the sum over ranks."""
    row_bytes: float
    """Of a curvature sampler, per row, while it draws."""
    scratch: float
    """Bytes of a pass or product that has hardly any rows."""


class Job(NamedTuple):
    """A model, as the flops of its forward pass tell it, and what is asked of it."""

    name: str
    n: float
    classes: int
    forward: float
    """Flops of the forward pass of a row in the sampling pass."""
    width: float
    """Numbers per row of a batch that the pass holds at once, beside its logits."""
    m: float
    selected: float
    """Flops of the forward pass of a row through the selected parameters and what follows them."""
    p: float
    """Selected parameters."""
    kept: float
    """Numbers kept per row of the subset: the graph of a product."""
    item: int = 4
    """Bytes per number."""
    ranks: int = 1


def predict(job: Job, machine: Machine) -> dict[str, float]:
    """Seconds and bytes (of the rank that takes most), by the formulas of the page."""
    share, own = job.n / job.ranks, job.m / job.ranks
    total = 2 * (job.ranks - 1) / job.ranks * 4 * job.p * machine.wire
    several = job.ranks > 1
    return {
        "pass": share / BATCH * machine.batch
        + share * (job.forward * machine.flop + job.classes * machine.logit)
        + job.n * machine.draw,
        "product": machine.product
        + 4 * own * job.selected * machine.product_flop
        + (2 * machine.meeting + total if several else 0.0),
        "pass bytes": machine.scratch
        + job.n * (machine.row_bytes + (4 + 4 / job.ranks if several else 0))
        + BATCH * job.item * (job.width + 3 * job.classes),
        "product bytes": machine.scratch + own * job.kept * job.item + VECTORS * 4 * job.p,
    }


def h100() -> Machine:
    """One of 8 H100 SXM: 989 Tflop/s bf16 dense, 3.35 TB/s, NVLink 450 GB/s each way."""
    used = 0.4  # of the arithmetic: what well-kept training of such models reaches
    return Machine(
        how="derived from published roofs (H100 SXM), 40 % of the arithmetic; not measured",
        batch=1e-4,
        flop=1 / (989e12 * used),
        logit=2 * 2 / 3.35e12,  # each of two samplers reads a bf16 logit once
        draw=3 * 4 / 3.35e12,
        product=1e-3,
        product_flop=1 / (989e12 * used),
        meeting=1e-3,
        wire=1 / 450e9,
        row_bytes=12.0,
        scratch=1e9,
    )


def large_jobs() -> list[tuple[Job, str]]:
    d, f, layers, vocabulary, context = 4096, 11008, 32, 32_000, 2048
    block, head = 4 * d * d + 3 * d * f, d * vocabulary
    attention = 4 * context * d  # flops per token of scores and their use
    through = 2.0 * (block + head) + attention
    linear = Job(
        *("head 2048 x 1000, n = 10^9", 1e9, 1000, 4.096e6, 2048),
        *(1e5, 4.096e6, 2.049e6, 2048 + 4 * 1000),
    )
    return [
        (linear, "cpu"),
        (linear._replace(name="the same on 64 ranks", ranks=64), "cpu"),
        (
            Job(
                "last block of a 7B model, 10^8 tokens, 8 GPUs",
                *(1e8, vocabulary, layers * (2.0 * block + attention) + 2 * head, 4 * d + 3 * f),
                *(65_536, through, block, 16 * d + 6 * f + 4 * vocabulary),
                item=2,
                ranks=8,
            ),
            "gpu",
        ),
    ]


FORMULAS = """| what | formula |
|---|---|
| pass, s | `n/R (F flop + Y logit + batch/1024) + n draw` |
| product, s | `product + 4 (m/R) F' product_flop + 2 meeting + 2 (R-1)/R 4p wire` |
| pass, bytes (rank 0) | `scratch + n (row_bytes + [4 + 4/R]) + 1024 item (A + 3Y)` |
| product, bytes | `scratch + (m/R) a item + 5 * 4p` |
"""
