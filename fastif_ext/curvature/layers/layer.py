"""What a layer does in a Hessian product, and the layers without weights; see layered.py.

Derivatives of a batch of rows [n, C] along R directions are tensors [n, R, C], those of images
[n, C, h, w] are [n, h, w, R, C]: then whatever is multiplied by weights is a matrix as it lies.
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
    """The gradient in the output; of an elementwise layer times the second derivative."""

    def rows(self, part: slice) -> Kept:
        """Those of some rows."""
        return Kept(*(None if t is None else t[part] for t in self))


@dataclass
class Job:
    """The directions of one product in a layer's parameters, and the gradient's derivative."""

    count: int
    weight: Tensor | None = None
    """[R out, K]"""
    across: Tensor | None = None
    """The same as [out, R K]"""
    own: Tensor | None = None
    """The layer's own weights, [out, K]"""
    bias: Tensor | None = None
    """[R out]"""
    sums: dict[str, Tensor] = field(default_factory=dict)


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

    def keep(self, a: Tensor, delta: Tensor) -> Kept:
        """What products need, from inputs and the loss's gradient in the outputs."""
        return Kept()

    def start(self, directions: Named, count: int) -> Job:
        """A product with R = count directions [R, *shape]."""
        return Job(count)

    def push(self, job: Job, kept: Kept, along: Tensor | None) -> tuple[Tensor | None, Any]:
        """R{outputs} from R{inputs}, which may be overwritten, and what `pull` needs of it."""
        return along, None

    def pull(self, job: Job, kept: Kept, memory: Any, back: Tensor) -> Tensor | None:
        """R{gradient in the inputs} from that in the outputs, which may be overwritten.

        Adds R{gradient in the parameters} to the job's sums. None where nothing below is selected.
        """
        return back

    def finish(self, job: Job) -> dict[str, Tensor]:
        """R{gradient} in the selected parameters, [R, *shape]."""
        return {}

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
        return along.permute(0, 3, 4, 1, 2).flatten(2), along.shape

    def pull(self, job: Job, kept: Kept, memory: Any, back: Tensor) -> Tensor | None:
        """R{gradient} in the inputs."""
        if memory is None:
            return back
        n, h, w, count, channels = memory
        images = back.view(n, count, channels, h, w)
        return images.permute(0, 3, 4, 1, 2).contiguous()


class Elementwise(Layer):
    """An activation f: slope f', bend f'' times the gradient in the output."""

    def fits(self, a: Tensor) -> bool:
        """Rows or images."""
        return a.dim() in (2, 4)

    def run(self, a: Tensor) -> Tensor:
        """The layer's outputs."""
        return self.module(a.clone() if getattr(self.module, "inplace", False) else a)

    def keep(self, a: Tensor, delta: Tensor) -> Kept:
        """Slope and bend."""
        curved = not isinstance(self.module, PIECEWISE_LINEAR)
        with torch.enable_grad():
            at = a.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.run(at).sum(), at, create_graph=curved)
            bend = torch.autograd.grad(slope.sum(), at)[0] * delta if curved else None
        return Kept(behind(slope.detach()), None if bend is None else behind(bend))

    def push(self, job: Job, kept: Kept, along: Tensor | None) -> tuple[Tensor | None, Any]:
        """R{outputs}, and R{inputs} times bend."""
        assert along is not None
        assert kept.first is not None
        if kept.second is None:
            return along.mul_(kept.first), None
        return along * kept.first, along.mul_(kept.second)

    def pull(self, job: Job, kept: Kept, memory: Any, back: Tensor) -> Tensor | None:
        """R{gradient} in the inputs."""
        assert kept.first is not None
        return back.mul_(kept.first) if memory is None else memory.addcmul_(back, kept.first)


def behind(a: Tensor) -> Tensor:
    """[n, C, ...] as [n, ..., 1, C]."""
    return a.movedim(1, -1).unsqueeze(-2).contiguous()
