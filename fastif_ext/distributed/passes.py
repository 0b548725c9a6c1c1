"""The passes of influence and class removal, shared by ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext.distributed.curvature import curvature, mean_gradient
from fastif_ext.distributed.extraction import extract, gathered
from fastif_ext.distributed.ranks import Ranks, opened
from fastif_ext.extract import Extracted
from fastif_ext.passes import Passes
from fastif_ext.stream import Layer


class SharedPasses(Passes):
    """Passes over data of which every rank makes its part: for ``influence`` and ``remove_class``.

    What the passes give is put together on all ranks, so that all draw the same samples, take the
    same steps and return the same report (but for its times, which are their own).

    Args:
        group: a process group, the default one if None; or Ranks, which have a timeout.

    Example:
        >>> import torch, torch.distributed as dist, fastif_ext as fi
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> passes = fi.distributed.SharedPasses()
        >>> model, loss = torch.nn.Linear(3, 1), torch.nn.functional.mse_loss
        >>> data, removed = (torch.randn(50, 3), torch.randn(50, 1)), torch.arange(5)
        >>> fi.influence(model, loss, removed, data, passes=passes).solve.converged
        True
        >>> dist.destroy_process_group()
    """

    def __init__(self, group: dist.ProcessGroup | Ranks | None = None) -> None:
        self.ranks = opened(group)

    def together(self, what: str, **facts: object) -> AbstractContextManager[None]:
        """All ranks enter the block with the same facts, and leave it if none failed in it."""
        return self.ranks.together(what, **facts)

    def extract(
        self,
        model: nn.Module,
        loader: DataLoader[Any],
        *,
        layer: Layer = None,
        progress: bool = False,
    ) -> Extracted:
        """As fastif_ext.extract, on all ranks."""
        own = extract(model, loader, layer=layer, progress=progress, group=self.ranks)
        whole = gathered(own, group=self.ranks)
        assert whole is not None
        return whole

    def curvature(self, *arguments: Any, **options: Any) -> Any:
        """As fastif_ext.distributed.curvature."""
        return curvature(*arguments, **options, group=self.ranks)

    def mean_gradient(self, *arguments: Any, **options: Any) -> Tensor:
        """As fastif_ext.distributed.mean_gradient."""
        return mean_gradient(*arguments, **options, group=self.ranks)
