"""Curvature operators by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext.curvature.gauss_newton import GaussNewton
from fastif_ext.curvature.hessian import Hessian
from fastif_ext.curvature.linear_softmax import LinearSoftmaxHessian, last_linear
from fastif_ext.data import Data, loader, map_style
from fastif_ext.objective import Loss, is_cross_entropy
from fastif_ext.parameters import Params, Selection

CURVATURES = ("hessian", "gauss-newton", "linear-softmax")


def make_curvature(
    name: str,
    model: nn.Module,
    loss_fn: Loss,
    data: Data,
    *,
    weights: Tensor | None = None,
    params: Params = None,
    chunk_size: int | None = None,
) -> Any:
    """The curvature operator of that name on some data.

    Args:
        name: "hessian", "gauss-newton", or "linear-softmax": the Hessian of the last nn.Linear
            under cross-entropy.
        model: the network.
        loss_fn: its mean loss.
        data: the rows.
        weights: one per row.
        params: the selected parameters; for "linear-softmax" those of the last nn.Linear.
        chunk_size: rows per chunk.

    Raises:
        ValueError: an unknown name; "linear-softmax" with another loss or other parameters.
    """
    if name == "hessian":
        return Hessian(model, loss_fn, data, weights=weights, params=params, chunk_size=chunk_size)
    if name == "gauss-newton":
        return GaussNewton(
            model, data, loss_fn=loss_fn, weights=weights, params=params, chunk_size=chunk_size
        )
    check_curvature(name)
    if not is_cross_entropy(loss_fn):
        raise ValueError("curvature='linear-softmax' needs cross-entropy; use 'gauss-newton'")
    selection = Selection(model, params)
    layer = last_linear(model)
    own = Selection(model, layer)
    if selection.mask is not None or list(selection.touched) != list(own.touched):
        raise ValueError(
            f"curvature='linear-softmax' is for the last nn.Linear, params={list(own.touched)}; "
            f"got {', '.join(selection.touched)}"
        )
    uses = [p for _, p in model.named_parameters(remove_duplicate=False) if p is layer.weight]
    frozen = layer.bias is not None and layer.bias.requires_grad != layer.weight.requires_grad
    if len(uses) > 1 or frozen:
        why = "its bias or weight is frozen" if frozen else "its weight is used elsewhere, too"
        raise ValueError(
            f"curvature='linear-softmax' is for a last nn.Linear that moves as a whole, and here "
            f"{why}; use 'hessian' or 'gauss-newton'"
        )
    batches = data if isinstance(data, DataLoader) else loader(map_style("data", data))
    return LinearSoftmaxHessian.of_last_layer(model, batches, weights=weights)


def check_curvature(name: str) -> None:
    """Require a name in CURVATURES."""
    if name not in CURVATURES:
        raise ValueError(f"curvature must be one of {CURVATURES}, got {name!r}")
