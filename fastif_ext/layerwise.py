"""Directional derivatives of every example's loss, layer by layer.

A linear layer's output is W a + b, so the derivative of example i's loss along (X, Y) is
delta_i . (X a_i + Y) with delta_i the gradient of its loss in the output: one forward and one
backward pass over the whole batch give every a_i and delta_i. A convolution is a linear layer on
patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, unfold

from fastif_ext.data import batch_rows
from fastif_ext.objective import WeightedLoss, differentiable, per_example

Place = tuple[int | None, int | None]
"""The numbers of a layer's weight and bias among the leaves; None where they are not selected."""
MOST = 1 << 24  # numbers that the examples' own gradients of a layer may take at a time
ALONG = 4  # up to this many directions are convolved with; beyond, gradients are formed


class _Call(NamedTuple):
    """One call of a layer: what went in, and a zero added to what came out."""

    module: nn.Module
    inputs: Tensor
    probe: Tensor


class Layers:
    """The linear and convolution layers that hold all selected parameters of a model."""

    def __init__(self, total: WeightedLoss, modules: Mapping[nn.Module, Place]) -> None:
        self.total, self.modules = total, modules
        self.numbers_per_row = 0
        """What an example's layers give out, once a pass was made."""

    @classmethod
    def of(cls, total: WeightedLoss) -> Layers | None:
        """The layers, or None where a selected parameter belongs to no such layer."""
        number = {id(p): i for i, p in enumerate(total.selection.touched.values())}
        modules: dict[nn.Module, Place] = {}
        covered: set[int] = set()
        for module in total.model.modules():
            if type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1):
                place = number.get(id(module.weight)), number.get(id(module.bias))
                if place != (None, None):
                    modules[module] = place
                    covered.update(i for i in place if i is not None)
        return cls(total, modules) if len(covered) == len(number) else None

    def derivatives(
        self, inputs: Any, targets: Tensor, directions: Sequence[Tensor]
    ) -> Tensor | None:
        """[R, b] for directions [R, *shape] per leaf; None where a layer mixes examples."""
        n = batch_rows(inputs)
        calls, deltas = self._run(inputs, targets)
        result = directions[0].new_zeros(directions[0].shape[0], n)
        for call, delta in zip(calls, deltas, strict=True):
            weight, bias = (None if i is None else directions[i] for i in self.modules[call.module])
            part = _derivative(call.module, call.inputs, delta, weight, bias, n)
            if part is None:
                return None
            result += part
        return result

    def _run(self, inputs: Any, targets: Tensor) -> tuple[list[_Call], Sequence[Tensor]]:
        """Every call of a layer, and the gradient of the summed loss in each one's output."""
        calls: list[_Call] = []

        def record(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # the loss's gradient in the probe is that in the output, even if the output is
            # overwritten in place afterwards
            probe = torch.zeros_like(output, requires_grad=True)
            calls.append(_Call(module, args[0].detach(), probe))
            return output.detach() + probe if not output.requires_grad else output + probe

        hooks = [module.register_forward_hook(record) for module in self.modules]
        try:
            with differentiable(self.total.model), torch.enable_grad():
                outputs = self.total.outputs(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        with torch.enable_grad():
            loss = per_example(self.total.loss_fn, outputs, targets).sum()
        probes = [call.probe for call in calls]
        self.numbers_per_row = sum(p.numel() for p in probes) // max(1, batch_rows(inputs))
        if not loss.requires_grad:
            return calls, [torch.zeros_like(probe) for probe in probes]
        return calls, torch.autograd.grad(loss, probes, allow_unused=True, materialize_grads=True)


def _derivative(
    module: nn.Module,
    a: Tensor,
    delta: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
) -> Tensor | None:
    """One layer's part, [R, n], for weight [R, *shape] and bias [R, out]."""
    if a.shape[0] != n or delta.shape[0] != n:
        return None
    conv = module if isinstance(module, nn.Conv2d) else None
    flat = delta.flatten(2) if conv else delta.reshape(n, -1, delta.shape[-1]).transpose(1, 2)
    part: Any = 0 if bias is None else bias @ flat.sum(2).T  # flat: [n, out, places]
    if weight is None:
        return part
    places, count = flat.shape[2], weight.shape[0]
    if places == 1 or count <= ALONG:  # X a first, for every direction
        if conv:
            z = _convolved(conv, a, weight.flatten(0, 1)).view(n, count, -1)
        else:
            z = a.reshape(n, places, -1) @ weight.flatten(0, 1).T  # [n, places, R out]
            z = z.view(n, places, count, -1).permute(0, 2, 3, 1).reshape(n, count, -1)
        return part + (z * flat.reshape(n, 1, -1)).sum(2).T
    # each example's own gradient first, summed over places, for as many as fit at a time
    flat_weight = weight.flatten(1)
    fit = max(1, MOST // max(flat_weight.shape[1], places * weight[0, 0].numel()))
    products = []
    for some, of_some in zip(a.split(fit), flat.split(fit), strict=True):
        seen = _patches(conv, some) if conv else some.reshape(len(some), places, -1)
        products.append(flat_weight @ torch.bmm(of_some, seen).flatten(1).T)
    return part + torch.cat(products, 1)


def _padded(module: nn.Conv2d, a: Tensor) -> tuple[Tensor, Any]:
    """The input and the padding that is still to do, as the module's own convolution has them."""
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return a, module.padding
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return pad(a, module._reversed_padding_repeated_twice, mode=mode), 0


def _convolved(module: nn.Conv2d, a: Tensor, weight: Tensor) -> Tensor:
    """The module's convolution with other weights [any, in, h, w]."""
    a, padding = _padded(module, a)
    return conv2d(a, weight, None, module.stride, padding, module.dilation)


def _patches(module: nn.Conv2d, a: Tensor) -> Tensor:
    """What each place of the output sees, [n, places, in * kernel]."""
    a, padding = _padded(module, a)
    return unfold(a, module.kernel_size, module.dilation, padding, module.stride).transpose(1, 2)
