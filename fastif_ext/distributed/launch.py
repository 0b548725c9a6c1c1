"""The ranks that torchrun started, for programs that run under it or alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import torch
import torch.distributed as dist
from torch import nn

from fastif_ext.distributed.ranks import Ranks


def size() -> int:
    """How many processes torchrun started, by its environment; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def started(device: torch.device) -> Iterator[Ranks | None]:
    """The ranks that torchrun started, of which only rank 0 prints; None without torchrun.

    Args:
        device: where tensors will be; each rank takes the GPU of its local rank.
    """
    if size() == 1:
        yield None
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        ranks = Ranks()
        with open(os.devnull, "w") as nowhere:
            out = sys.stdout if ranks.rank == 0 else nowhere
            with redirect_stdout(out):
                yield ranks
    finally:
        dist.destroy_process_group()


def share_model(model: nn.Module, ranks: Ranks) -> None:
    """Overwrite parameters and buffers by those of rank 0.

    Each rank trained its own from one seed; on a GPU that need not give the same bits.
    """
    ranks.broadcast_("model", [*model.parameters(), *model.buffers()])
