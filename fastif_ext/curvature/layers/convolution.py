"""Convolutions in a Hessian product: linear layers on patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from fastif_ext.curvature.layers.layer import Named
from fastif_ext.curvature.layers.linear import Linear

Pair = tuple[int, ...]
"""A number for each of an image's two axes."""


class Convolution(Linear):
    """nn.Conv2d in one group, padded with zeros."""

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Not in groups, nor with other padding."""
        assert isinstance(module, nn.Conv2d)
        zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return zeros and module.groups == 1

    def __init__(self, module: nn.Module, values: Named, places: Mapping[str, int]) -> None:
        super().__init__(module, values, places)
        assert isinstance(module, nn.Conv2d)
        self._kernel: Any = module.kernel_size
        self._stride: Any = module.stride
        self._padding: Any = module.padding
        self._dilation: Any = module.dilation

    def fits(self, a: Tensor) -> bool:
        """Only images."""
        return a.dim() == 4

    def run(self, a: Tensor) -> Tensor:
        """The layer's outputs."""
        weight, bias = self.values["weight"], self.values.get("bias")
        return conv2d(a, weight, bias, self._stride, self._padding, self._dilation)

    def matrix(self, weight: Tensor) -> Tensor:
        """[..., out, in, h, w] as [..., out, h w in]."""
        return weight.movedim(-3, -1).flatten(-3)

    def shaped(self, matrices: Tensor) -> Tensor:
        """[R, out, h w in] as [R, out, in, h, w]."""
        return matrices.unflatten(-1, (*self._kernel, -1)).movedim(-1, -3)

    def gather(self, along: Tensor) -> Tensor:
        """Patches [n, h', w', R, kernel C] of images [n, h, w, R, C]."""
        self._size = along.shape[1:3]
        top, left = self._padding
        padded = pad(along, (0, 0, 0, 0, left, left, top, top)) if top or left else along
        return patches(padded, self._kernel, self._stride, self._dilation).flatten(4)

    def scatter(self, back: Tensor, n: int) -> Tensor:
        """The sum of patches, where they lie."""
        (top, left), (down, right) = self._padding, self._stride
        (h, w), (dy, dx), (height, width) = self._kernel, self._dilation, self._size
        heights, widths = self._places
        patches = back.view(n, heights, widths, back.shape[1], h, w, -1)
        images = back.new_zeros(
            n, height + 2 * top, width + 2 * left, back.shape[1], patches.shape[-1]
        )
        for i in range(h):
            for j in range(w):
                rows = slice(i * dy, i * dy + (heights - 1) * down + 1, down)
                columns = slice(j * dx, j * dx + (widths - 1) * right + 1, right)
                images[:, rows, columns].add_(patches[:, :, :, :, i, j])
        return images[:, top : top + height, left : left + width].contiguous()


def patches(images: Tensor, kernel: Pair, stride: Pair, dilation: Pair) -> Tensor:
    """What each place of a convolution's output sees, [n, h', w', R, h, w, C], as a view.

    Args:
        images: padded, [n, height, width, R, C].
        kernel: (h, w), as nn.Conv2d has it; and so are the following.
        stride: (down, right).
        dilation: of the kernel.
    """
    heights, widths = (
        (size - d * (k - 1) - 1) // s + 1
        for size, d, k, s in zip(images.shape[1:3], dilation, kernel, stride, strict=True)
    )
    n, y, x, r, c = images.stride()
    return images.as_strided(
        (len(images), heights, widths, images.shape[3], *kernel, images.shape[4]),
        (n, y * stride[0], x * stride[1], r, y * dilation[0], x * dilation[1], c),
        images.storage_offset(),
    )
