"""The passes over data that influence and class removal consist of."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext import objective
from fastif_ext.curvature import make_curvature
from fastif_ext.data import Data
from fastif_ext.extract import Extracted, extract
from fastif_ext.objective import Loss
from fastif_ext.parameters import Params
from fastif_ext.stream import Layer


class Passes:
    """Every pass made by this process alone.

    fastif_ext.distributed.SharedPasses overrides all of it: the same passes, shared by ranks.
    Arguments are those of the functions.
    """

    def together(self, what: str, **facts: object) -> AbstractContextManager[None]:
        """Around a computation: all who share its passes enter it with the same facts."""
        return nullcontext()

    def extract(
        self,
        model: nn.Module,
        loader: DataLoader[Any],
        *,
        layer: Layer = None,
        progress: bool = False,
    ) -> Extracted:
        """As fastif_ext.extract."""
        return extract(model, loader, layer=layer, progress=progress)

    def curvature(
        self,
        name: str,
        model: nn.Module,
        loss_fn: Loss,
        data: Data,
        *,
        weights: Tensor | None,
        params: Params,
        chunk_size: int | None,
    ) -> Any:
        """As fastif_ext.curvature.make_curvature."""
        return make_curvature(
            name, model, loss_fn, data, weights=weights, params=params, chunk_size=chunk_size
        )

    def mean_gradient(
        self,
        model: nn.Module,
        loss_fn: Loss,
        data: Data,
        *,
        weights: Tensor | None,
        params: Params,
        chunk_size: int | None,
    ) -> Tensor:
        """As fastif_ext.mean_gradient."""
        return objective.mean_gradient(
            model, loss_fn, data, weights=weights, params=params, chunk_size=chunk_size
        )


HERE = Passes()
