"""A layer's part of directional derivatives: delta_i . (X_r a_i + Y_r) for all rows i and r.

Rows go through in blocks whose intermediate stays in a cache, in memory that is kept: fresh memory
costs more than the arithmetic (per-example gradients of 512 rows of a convolution 32 -> 64 by `bmm`
take 22 ms into fresh memory, 4 into memory in use; one thread of a Zen 4 core).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, embedding, pad

from fastif_ext.curvature.layers.convolution import patches
from fastif_ext.normalized import NORMALIZED, entries

BLOCK = 1 << 19  # numbers of an intermediate at a time
FEW = 2  # up to this many directions are convolved with; beyond, gradients are formed


class Scratch:
    """Memory that stays between calls, a piece for each purpose."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, purpose: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A contiguous tensor of any contents, until the same purpose is asked for again."""
        size = torch.Size(shape).numel()
        held = self._held.get(purpose)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            held = self._held[purpose] = like.new_empty(size)
        return held[:size].view(shape)


def weight_product(
    module: nn.Module, a: Tensor, delta: Tensor, weight: Tensor, scratch: Scratch
) -> Tensor:
    """[R, n] for inputs a, the loss's gradient delta in the outputs, and weight [R, *shape]."""
    if type(module) in NORMALIZED:
        return bias_product(module, NORMALIZED[type(module)](module, a) * delta, weight)
    if isinstance(module, nn.Embedding):
        return torch.stack([embedding(a, w).mul_(delta).flatten(1).sum(1) for w in weight])
    if isinstance(module, nn.Conv1d):
        a, delta, weight = a.unsqueeze(2), delta.unsqueeze(2), weight.unsqueeze(-2)
        module = _as_conv2d(module)
    flat = _places(module, delta)
    if isinstance(module, nn.Conv2d):
        if len(weight) <= FEW or module.groups > 1:
            return torch.stack([_convolved(module, a, w, delta) for w in weight])
        matrices = weight.movedim(-3, -1).flatten(2)  # [R, out, h w in]
        return _by_gradients(module, a, flat, matrices, scratch)
    a = a.reshape(len(a), -1, a.shape[-1])
    if a.shape[1] > 1 and len(weight) > FEW:
        return _by_gradients(None, a, flat, weight, scratch)
    along = _by_outputs(a.flatten(0, 1), flat.flatten(0, 1), weight, scratch)
    return along.view(len(weight), len(a), -1).sum(2) if a.shape[1] > 1 else along


def bias_product(module: nn.Module, delta: Tensor, bias: Tensor) -> Tensor:
    """[R, n] for bias [R, *shape]."""
    flat = _places(module, delta)
    return bias.flatten(1) @ (flat.sum(1) if flat.shape[1] > 1 else flat[:, 0]).T


def _places(module: nn.Module, delta: Tensor) -> Tensor:
    """The gradient in a layer's outputs as [n, places, out]."""
    if type(module) in NORMALIZED:
        return entries(module, delta)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return delta.movedim(1, -1).flatten(1, -2)
    return delta.reshape(len(delta), -1, delta.shape[-1])


def _as_conv2d(module: nn.Conv1d) -> nn.Conv2d:
    """The same convolution of images of height 1, without its weights."""
    (kernel,), (stride,), (dilation,) = module.kernel_size, module.stride, module.dilation
    padding = module.padding if isinstance(module.padding, str) else (0, module.padding[0])
    return nn.Conv2d(
        module.in_channels, module.out_channels, (1, kernel), (1, stride), padding, (1, dilation),
        module.groups, padding_mode=module.padding_mode, device="meta",
    )  # fmt: skip


def _convolved(module: nn.Conv2d, a: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
    """[n], by the module's convolution with other weights."""
    a, padding = _padded(module, a)
    z = conv2d(a, weight, None, module.stride, padding, module.dilation, module.groups)
    return z.mul_(delta).sum((1, 2, 3))


def _by_outputs(a: Tensor, delta: Tensor, weight: Tensor, scratch: Scratch) -> Tensor:
    """[R, m] for rows [m, in] and [m, out]: X a first, or delta X where that is smaller.

    Rows lie in the last axis, where products and sums over them run at the speed of the cache.
    """
    if delta.shape[1] > a.shape[1]:
        a, delta, weight = delta, a, weight.mT
    count, width, _ = weight.shape
    matrix, across = weight.flatten(0, 1), delta.T.contiguous()
    result = a.new_empty(count, len(a))
    for rows in _blocks(len(a), count * width):
        z = scratch.take("z", (count * width, rows.stop - rows.start), a)
        z = torch.mm(matrix, a[rows].T, out=z).view(count, width, -1)
        torch.sum(z.mul_(across[:, rows]), 1, out=result[:, rows])
    return result


def _by_gradients(
    module: nn.Conv2d | None, a: Tensor, delta: Tensor, weight: Tensor, scratch: Scratch
) -> Tensor:
    """[R, n] from each example's gradient, summed over places: delta [n, places, out]."""
    n, places, out = delta.shape
    matrix, width = weight.flatten(1), weight.shape[2]
    result = a.new_empty(len(weight), n)
    for rows in _blocks(n, width * max(out, places)):
        seen = a[rows] if module is None else _patches(module, a[rows], scratch)
        own = scratch.take("gradients", (len(seen), out, width), a)
        torch.bmm(delta[rows].mT, seen, out=own)
        torch.mm(matrix, own.flatten(1).T, out=result[:, rows])
    return result


def _blocks(n: int, width: int) -> Iterator[slice]:
    """The rows, as many at a time as keep n x width numbers in a cache."""
    size = max(1, BLOCK // width)
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def _padded(module: nn.Conv2d, a: Tensor) -> tuple[Tensor, Any]:
    """The input and the padding that is still to do, as the module's own convolution has them."""
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return a, module.padding
    return _surrounded(module, a), 0


def _surrounded(module: nn.Conv2d, a: Tensor) -> Tensor:
    """The input with all of the module's padding."""
    around: list[int] = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return pad(a, around, mode=mode) if any(around) else a


def _patches(module: nn.Conv2d, a: Tensor, scratch: Scratch) -> Tensor:
    """What each place of the output sees, [n, places, h w in]."""
    images = _surrounded(module, a).movedim(1, -1)
    seen = patches(images, module.kernel_size, module.stride, module.dilation)
    held = scratch.take("patches", tuple(seen.shape), a).copy_(seen)
    return held.view(len(a), seen.shape[1] * seen.shape[2], -1)
