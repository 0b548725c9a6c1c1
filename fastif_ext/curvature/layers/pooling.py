"""Pooling in a curvature product: linear at the inputs that were kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from fastif_ext.curvature.layers.layer import Job, Kept, Layer, Named, as_images, channels_behind


class MaxPool(Layer):
    """nn.MaxPool2d: the derivatives of the inputs that are largest."""

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Not where the places are an output, too."""
        assert isinstance(module, nn.MaxPool2d)
        return not module.return_indices

    def __init__(self, module: nn.Module, values: Named, places: Mapping[str, int]) -> None:
        super().__init__(module, values, places)
        assert isinstance(module, nn.MaxPool2d)
        pairs = (_pair(t) for t in (module.kernel_size, module.stride, module.dilation))
        self._apart = [-(-(d * (k - 1) + 1) // s) for k, s, d in zip(*pairs, strict=True)]
        """Windows so many apart have no input in common."""

    def fits(self, a: Tensor) -> bool:
        """Only images."""
        return a.dim() == 4

    def run(self, a: Tensor) -> Tensor:
        """The layer's outputs."""
        return self.module(a)

    def keep(self, a: Tensor, delta: Tensor | None) -> Kept:
        """Where the largest inputs are, [n, h', w', C], counted through an image."""
        m: Any = self.module
        windows = m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode
        return Kept(channels_behind(max_pool2d(a, *windows, return_indices=True)[1]))

    def push(self, job: Job, kept: Kept, along: Tensor | None) -> tuple[Tensor | None, Any]:
        """R{outputs}, and the shape of R{inputs}."""
        assert along is not None
        assert kept.first is not None
        found = along.flatten(2, 3).gather(2, _index(kept.first, job.count))
        return found.unflatten(2, kept.first.shape[1:3]), along.shape

    def pull(self, job: Job, kept: Kept, memory: Any, back: Tensor) -> Tensor:
        """R{gradient} in the inputs, whose sums are in the same order on every device."""
        assert kept.first is not None
        images = back.new_zeros(memory).flatten(2, 3)
        down, right = self._apart
        for i in range(down):
            for j in range(right):
                index = _index(kept.first[:, i::down, j::right], job.count)
                images.scatter_add_(2, index, back[:, :, i::down, j::right].flatten(2, 3))
        return images.view(memory)


class AveragePool(Layer):
    """nn.AvgPool2d, and nn.AdaptiveAvgPool2d to one place."""

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Not to several places whose number is given: a GPU's sums then vary."""
        adaptive = isinstance(module, nn.AdaptiveAvgPool2d)
        return not adaptive or _pair(module.output_size) == (1, 1)

    def fits(self, a: Tensor) -> bool:
        """Only images."""
        return a.dim() == 4

    def run(self, a: Tensor) -> Tensor:
        """The layer's outputs."""
        return self.module(a)

    def push(self, job: Job, kept: Kept, along: Tensor | None) -> tuple[Tensor | None, Any]:
        """R{outputs}, and the shape of R{inputs}."""
        assert along is not None
        found = channels_behind(self.module(as_images(along.flatten(0, 1))))
        return found.unflatten(0, along.shape[:2]), along.shape

    def pull(self, job: Job, kept: Kept, memory: Any, back: Tensor) -> Tensor:
        """R{gradient} in the inputs."""
        with torch.enable_grad():
            inputs = as_images(back.new_zeros(memory).flatten(0, 1)).requires_grad_()
            outputs = self.module(inputs)
        (images,) = torch.autograd.grad(outputs, inputs, as_images(back.flatten(0, 1)))
        return channels_behind(images).view(memory)


def _pair(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _index(places: Tensor, count: int) -> Tensor:
    """[n, h', w', C] for all directions, [R, n, h' w', C]."""
    return places.flatten(1, 2).expand(count, -1, -1, -1)
