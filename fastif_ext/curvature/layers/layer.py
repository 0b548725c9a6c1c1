"""What a layer does in a curvature product, and the layers without weights; see layered.py.

A gradient in the outputs that is None counts as zero, in products with the Gauss-Newton matrix.

What is kept of n rows is [n, C], of images [n, h, w, C]; derivatives along R directions have one
more axis in front, [R, n, ...]. So the images of all directions are one batch in channels_last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Named = Mapping[str, Tensor]
"""A layer's tensors by the name of the parameter: "weight", "bias"."""
PIECEWISE_LINEAR = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh)


class Kept(NamedTuple):
    """What products need of a layer, for n rows."""

    first: Tensor | None = None
    """Of an elementwise layer the slope; of others what is multiplied by the weights."""
    second: Tensor | None = None
    """The gradient in the outputs; of an elementwise layer times the second derivative."""

    def rows(self, part: slice) -> Kept:
        """Those of some rows."""
        return Kept(*(None if t is None else t[part] for t in self))


@dataclass
class Job:
    """The directions of one product in a layer's parameters, and the gradient's derivative."""

    count: int
    weight: Tensor | None = None
    """[R, *shape]"""
    bias: Tensor | None = None
    """[R, out]"""
    own: Tensor | None = None
    """The layer's own weights."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Derivatives of the gradient in the selected parameters, [R, *shape]."""

    def add(self, name: str, term: Tensor) -> None:
        """To the sums."""
        self.sums[name] = self.sums[name].add_(term) if name in self.sums else term


class Layer:
    """A layer of a chain; this one passes its input on.

    Args:
        module: the layer.
        values: its parameters' values.
        places: of the selected ones, their numbers among all selected parameters.
    """

    parameters: frozenset[str] = frozenset()

    def __init__(self, module: nn.Module, values: Named, places: Mapping[str, int]) -> None:
        self.module, self.values, self.places = module, values, places

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether this module of the type is covered."""
        return True

    def fits(self, a: Tensor) -> bool:
        """Whether inputs of this shape are covered."""
        return True

    def run(self, a: Tensor) -> Tensor:
        """The layer's outputs."""
        return a.view_as(a)

    def keep(self, a: Tensor, delta: Tensor | None) -> Kept:
        """What products need, from inputs and the loss's gradient in the outputs."""
        return Kept()

    def start(self, directions: Named, count: int) -> Job:
        """A product with R = count directions [R, *shape]."""
        return Job(count, directions.get("weight"), directions.get("bias"))

    def push(self, job: Job, kept: Kept, along: Tensor | None) -> tuple[Tensor | None, Any]:
        """R{outputs} from R{inputs}, which may be overwritten, and what is needed on the way back.

        R{inputs} is None for zero, in the first layer.
        """
        return along, None

    def gather(self, job: Job, kept: Kept, memory: Any, back: Tensor) -> None:
        """Adds R{gradient in the parameters} to the job's sums, from that in the outputs."""

    def pull(self, job: Job, kept: Kept, memory: Any, back: Tensor) -> Tensor:
        """R{gradient in the inputs} from that in the outputs, which may be overwritten."""
        return back

    def example_gradients(self, kept: Kept) -> dict[str, Tensor]:
        """Each row's own gradient in the selected parameters, [n, *shape]."""
        return {}


class Flatten(Layer):
    """nn.Flatten of images to rows."""

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Only from the first axis behind the rows to the last one."""
        assert isinstance(module, nn.Flatten)
        return (module.start_dim, module.end_dim) == (1, -1)

    def fits(self, a: Tensor) -> bool:
        """Rows or images."""
        return a.dim() in (2, 4)

    def run(self, a: Tensor) -> Tensor:
        """The layer's outputs."""
        return a.flatten(1)

    def push(self, job: Job, kept: Kept, along: Tensor | None) -> tuple[Tensor | None, Any]:
        """R{outputs}, and the shape of R{inputs}."""
        assert along is not None
        if along.dim() == 3:
            return along, None
        return along.movedim(-1, -3).flatten(2), along.shape

    def pull(self, job: Job, kept: Kept, memory: Any, back: Tensor) -> Tensor:
        """R{gradient} in the inputs."""
        if memory is None:
            return back
        *outer, h, w, channels = memory
        return back.view(*outer, channels, h, w).movedim(-3, -1).contiguous()


class Elementwise(Layer):
    """An activation f: slope f', bend f'' times the gradient in the output."""

    def fits(self, a: Tensor) -> bool:
        """Rows or images."""
        return a.dim() in (2, 4)

    def run(self, a: Tensor) -> Tensor:
        """The layer's outputs."""
        return self.module(a.clone() if getattr(self.module, "inplace", False) else a)

    def keep(self, a: Tensor, delta: Tensor | None) -> Kept:
        """Slope and bend."""
        if isinstance(self.module, PIECEWISE_LINEAR):
            delta = None
        with torch.enable_grad():
            at = a.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.run(at).sum(), at, create_graph=delta is not None)
            bend = None if delta is None else torch.autograd.grad(slope.sum(), at)[0] * delta
        slope = channels_behind(slope.detach())
        return Kept(slope, None if bend is None else channels_behind(bend))

    def push(self, job: Job, kept: Kept, along: Tensor | None) -> tuple[Tensor | None, Any]:
        """R{outputs}, and R{inputs} times bend."""
        assert along is not None
        assert kept.first is not None
        if kept.second is None:
            return along.mul_(kept.first), None
        return along * kept.first, along.mul_(kept.second)

    def pull(self, job: Job, kept: Kept, memory: Any, back: Tensor) -> Tensor:
        """R{gradient} in the inputs."""
        assert kept.first is not None
        return back.mul_(kept.first) if memory is None else memory.addcmul_(back, kept.first)


def channels_behind(a: Tensor) -> Tensor:
    """[n, C, ...] as [n, ..., C]."""
    return a.movedim(1, -1).contiguous()


def as_images(a: Tensor) -> Tensor:
    """[..., h, w, C] as [..., C, h, w], a view."""
    return a.movedim(-1, -3)
