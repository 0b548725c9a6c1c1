"""Parameters that matter to some data: the selections of the generalised-influence paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastif_ext.data import Data, batch_rows, batches, call, to_device
from fastif_ext.device import kept_rng
from fastif_ext.objective import Loss, differentiable
from fastif_ext.parameters import Selection

MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def select_parameters(
    model: nn.Module,
    data: Data,
    ratio: float,
    *,
    by: str = "output",
    loss_fn: Loss = cross_entropy,
) -> Tensor:
    """The weights of the units that respond most to some data, as a mask for ``params=``.

    In each Linear and Conv module the ``floor(ratio * units)`` output units with the largest |mean
    output|, or the largest |mean gradient of the loss in the output|, over the data (and over
    positions) are taken, each with its row of weights and its bias (arXiv 2312.05586).

    Args:
        model: left as it was.
        data: the data that is to be removed: (inputs, targets), a Dataset or a DataLoader.
        ratio: share of each module's units, in (0, 1].
        by: "output" or "gradient".
        loss_fn: loss_fn(outputs, targets) -> mean loss, for by="gradient".

    Returns:
        bool [p] over all trainable parameters in named_parameters() order.

    Raises:
        ValueError: ratio or by out of range, nothing to select from, a ratio that selects nothing.

    Example:
        >>> import torch, fastif_ext as fi
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 1.0], [5.0, 5.0]]))
        >>> fi.select_parameters(model, (torch.ones(3, 2), torch.zeros(3).long()), 0.5)
        tensor([False, False,  True,  True])
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"select_parameters: ratio must be in (0, 1], got {ratio}")
    if by not in ("output", "gradient"):
        raise ValueError(f"select_parameters: by must be 'output' or 'gradient', got {by!r}")
    whole = Selection(model)
    sums = _sums(model, data, loss_fn if by == "gradient" else None)
    chosen = {id(p): torch.zeros(p.shape, dtype=torch.bool) for p in whole.touched.values()}
    for module, total in sums.items():
        units = total.abs().topk(math.floor(ratio * len(total))).indices.cpu()
        for p in (module.weight, module.bias):
            if p is not None and id(p) in chosen:
                chosen[id(p)][units] = True
    mask = torch.cat([chosen[id(p)].flatten() for p in whole.touched.values()])
    if not mask.any():
        sizes = [len(total) for total in sums.values()]
        raise ValueError(
            f"select_parameters: ratio = {ratio} selects nothing of the {sizes} output units of "
            f"the model's Linear and Conv modules; use a larger ratio"
        )
    return mask


def _sums(model: nn.Module, data: Data, loss_fn: Loss | None) -> dict[Any, Tensor]:
    """For each module used: the sum over the data of its output, or of the gradient in it."""
    sums: dict[Any, Tensor] = {}

    def add(module: nn.Module, value: Tensor) -> None:
        units = -1 if isinstance(module, nn.Linear) else 1
        per_unit = value.detach().double().movedim(units, 0).flatten(1).sum(1)
        sums[module] = sums.get(module, 0) + per_unit

    def on_output(module: nn.Module, args: Any, output: Tensor) -> None:
        if loss_fn is None:
            add(module, output)
        elif output.requires_grad:
            output.register_hook(lambda g: add(module, g))

    device = next(iter(Selection(model).touched.values())).device
    hooks: list[Callable[[], None]] = [
        m.register_forward_hook(on_output).remove for m in model.modules() if isinstance(m, MODULES)
    ]
    try:
        with differentiable(model), kept_rng(device):
            for inputs, targets in batches(data):
                inputs = to_device(inputs, device)
                with torch.set_grad_enabled(loss_fn is not None):
                    outputs = call(model, inputs)
                if loss_fn is not None:
                    with torch.enable_grad():
                        loss = loss_fn(outputs, torch.as_tensor(targets).to(device))
                    parameters = list(Selection(model).touched.values())
                    # the hooks do the work; .grad of the user's parameters is not touched
                    torch.autograd.grad(loss * batch_rows(inputs), parameters, allow_unused=True)
    finally:
        for remove in hooks:
            remove()
    if not sums:
        raise ValueError(
            "select_parameters: model and data give no output of a Linear or Conv module"
        )
    return sums
