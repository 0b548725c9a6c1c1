"""Convolutions in a curvature product.

What the weights W do goes over all directions' images at once, what a direction V does over the
inputs a once for each. On the way back in a Hessian both are one convolution beside each other in
the channels, W^T R{delta} + V^T delta = (W V)^T (R{delta}; delta).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from fastif_ext.curvature.layers.layer import Job, Kept, Layer, Named, as_images, channels_behind

Pair = tuple[int, ...]
"""A number for each of an image's two axes."""


class Convolution(Layer):
    """nn.Conv2d in one group, padded with zeros."""

    parameters = frozenset({"weight", "bias"})

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Not in groups, nor with other padding."""
        assert isinstance(module, nn.Conv2d)
        zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return zeros and module.groups == 1

    def __init__(self, module: nn.Module, values: Named, places: Mapping[str, int]) -> None:
        super().__init__(module, values, places)
        assert isinstance(module, nn.Conv2d)
        self._kernel = module.kernel_size
        self._windows: Any = (module.stride, module.padding, module.dilation)

    def fits(self, a: Tensor) -> bool:
        """Only images."""
        return a.dim() == 4

    def run(self, a: Tensor) -> Tensor:
        """The layer's outputs."""
        return conv2d(a, self.values["weight"], self.values.get("bias"), *self._windows)

    def keep(self, a: Tensor, delta: Tensor | None) -> Kept:
        """Inputs and gradient in the outputs."""
        return Kept(channels_behind(a), None if delta is None else channels_behind(delta))

    def start(self, directions: Named, count: int) -> Job:
        """The directions and the layer's own weights, [..., out, in, h, w] in channels_last."""
        job = super().start(directions, count)
        job.own = _channels_last(self.values["weight"].detach())
        job.weight = None if job.weight is None else _channels_last(job.weight)
        return job

    def push(self, job: Job, kept: Kept, along: Tensor | None) -> tuple[Tensor | None, Any]:
        """V a + b' + W R{a}, and for a Hessian R{a}."""
        a, delta = kept
        assert a is not None
        assert job.own is not None
        result = None
        if along is not None:
            result = self._forward(along.flatten(0, 1), job.own, None).unflatten(0, (job.count, -1))
            if job.weight is None:
                if job.bias is not None:
                    result.add_(job.bias[:, None, None, None])
                return result, None
        weights = job.weight
        if weights is None:  # in the first layer, of which the bias alone is selected
            weights = job.own.new_zeros(job.count, *job.own.shape)
        biases = [None] * job.count if job.bias is None else job.bias
        terms = [self._forward(a, *own) for own in zip(weights, biases, strict=True)]
        if result is None:
            return torch.stack(terms), None
        for of_direction, term in zip(result, terms, strict=True):
            of_direction.add_(term)
        return result, None if delta is None else along

    def gather(self, job: Job, kept: Kept, memory: Any, back: Tensor) -> None:
        """R{delta} a^T + delta R{a}^T."""
        a, delta = kept
        assert a is not None
        assert job.own is not None
        if job.bias is not None:
            job.add("bias", back.sum((1, 2, 3)))
        if job.weight is not None:
            gradients = []
            for r, slope in enumerate(back):
                gradient = self._backward(slope, a, job.own, 1)
                if memory is not None:
                    assert delta is not None
                    gradient = gradient.add_(self._backward(delta, memory[r], job.own, 1))
                gradients.append(gradient)
            job.add("weight", torch.stack(gradients))

    def pull(self, job: Job, kept: Kept, memory: Any, back: Tensor) -> Tensor:
        """W^T R{delta} + V^T delta."""
        a, delta = kept
        assert a is not None
        assert job.own is not None
        if delta is None or job.weight is None:
            inputs = a.new_empty(job.count * len(a), *a.shape[1:])  # their shape is what counts
            below = self._backward(back.flatten(0, 1), inputs, job.own, 0)
            return channels_behind(below).unflatten(0, (job.count, -1))
        parts = []
        for slope, weight in zip(back, job.weight, strict=True):
            slope, weight = torch.cat([slope, delta], -1), torch.cat([job.own, weight])
            parts.append(self._backward(slope, a, weight, 0).movedim(1, -1))
        return torch.stack(parts)

    def _forward(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[n, h', w', out] for [n, h, w, in]."""
        return channels_behind(conv2d(as_images(a), weight, bias, *self._windows))

    def _backward(self, slope: Tensor, a: Tensor, weight: Tensor, of: int) -> Tensor:
        """The gradient in the inputs (of = 0) or in the weights (1) from that in the outputs."""
        wanted = [of == 0, of == 1, False]
        windows = *self._windows, False, [0, 0], 1
        images = as_images(slope), as_images(a)
        return torch.ops.aten.convolution_backward(*images, weight, None, *windows, wanted)[of]

    def example_gradients(self, kept: Kept) -> dict[str, Tensor]:
        """delta a^T, summed over places."""
        a, delta = kept
        assert a is not None
        assert delta is not None
        found = {}
        if "weight" in self.places:
            stride, (top, left), dilation = self._windows
            padded = nn.functional.pad(a, (0, 0, left, left, top, top))
            seen = patches(padded, self._kernel, stride, dilation).flatten(3).flatten(1, 2)
            matrices = delta.flatten(1, 2).mT @ seen
            found["weight"] = as_images(matrices.unflatten(-1, (*self._kernel, -1)))
        if "bias" in self.places:
            found["bias"] = delta.sum((1, 2))
        return found


def patches(images: Tensor, kernel: Pair, stride: Pair, dilation: Pair) -> Tensor:
    """What each place of a convolution's output sees, [n, h', w', h, w, C], as a view.

    Args:
        images: padded, [n, height, width, C].
        kernel: (h, w), as nn.Conv2d has it; and so are the following.
        stride: (down, right).
        dilation: of the kernel.
    """
    heights, widths = (
        (size - d * (k - 1) - 1) // s + 1
        for size, d, k, s in zip(images.shape[1:3], dilation, kernel, stride, strict=True)
    )
    n, y, x, c = images.stride()
    return images.as_strided(
        (len(images), heights, widths, *kernel, images.shape[3]),
        (n, y * stride[0], x * stride[1], y * dilation[0], x * dilation[1], c),
        images.storage_offset(),
    )


def _channels_last(weight: Tensor) -> Tensor:
    """[..., in, h, w] with the channels next to each other."""
    return as_images(weight.movedim(-3, -1).contiguous())
