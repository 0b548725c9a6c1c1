"""Layers whose derivative along directions in their parameters is written out; see layered.py.

Derivatives of a batch of rows [n, C] along R directions are tensors [n, R, C], those of images
[n, C, h, w] are [n, h, w, R, C]: then whatever is multiplied by weights is a matrix as it lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, pad

Named = Mapping[str, Tensor]
"""A layer's tensors by the name of the parameter: "weight", "bias"."""
PIECEWISE_LINEAR = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh)
SMOOTH = (nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.Softplus, nn.Mish)
IDLE = (nn.Identity, nn.Dropout, nn.Dropout2d)  # idle in eval mode


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
        return Kept(_behind(slope.detach()), None if bend is None else _behind(bend))

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


class Linear(Layer):
    """nn.Linear on rows: weights [out, K] times what lies in `places` of n rows, [n, places, K]."""

    parameters = frozenset({"weight", "bias"})

    def fits(self, a: Tensor) -> bool:
        """Only rows."""
        return a.dim() == 2

    def run(self, a: Tensor) -> Tensor:
        """The layer's outputs."""
        return linear(a, self.values["weight"], self.values.get("bias"))

    def matrix(self, weight: Tensor) -> Tensor:
        """Weights [..., out, *shape] as [..., out, K]."""
        return weight

    def gather(self, along: Tensor) -> Tensor:
        """R{inputs} as they are multiplied by the weights, [n, *places, R, K]."""
        return along

    def scatter(self, back: Tensor, n: int) -> Tensor:
        """The transpose of gather, from [n places, R, K]."""
        return back

    def keep(self, a: Tensor, delta: Tensor) -> Kept:
        """Inputs and gradient in the outputs."""
        gathered = self.gather(_behind(a))
        self._places = gathered.shape[1:-2]
        delta = delta.movedim(1, -1)
        return Kept(gathered.flatten(1, -2), delta.reshape(len(a), -1, delta.shape[-1]))

    def start(self, directions: Named, count: int) -> Job:
        """The directions as matrices."""
        job = Job(count, own=self.matrix(self.values["weight"].detach()))
        if "weight" in directions:
            matrices = self.matrix(directions["weight"])  # [R, out, K]
            job.weight = matrices.flatten(0, 1)
            job.across = matrices.transpose(0, 1).flatten(1)
        if "bias" in directions:
            job.bias = directions["bias"].reshape(-1)
        return job

    def push(self, job: Job, kept: Kept, along: Tensor | None) -> tuple[Tensor | None, Any]:
        """V a + b' + W R{a}, and R{a} gathered."""
        assert kept.first is not None
        n, a = len(kept.first), kept.first.flatten(0, 1)  # [m, K], m = n places
        assert job.own is not None
        m, out, own = len(a), len(job.own), job.own
        result = None
        if job.weight is not None:
            result = linear(a, job.weight, job.bias)
        elif job.bias is not None:
            result = job.bias.expand(m, -1).contiguous()
        if along is not None:
            along = self.gather(along).reshape(m * job.count, -1)
            if result is None:
                result = along @ own.T
            else:
                result.view(-1, out).addmm_(along, own.T)
        assert result is not None
        return result.view(n, *self._places, job.count, out), along

    def pull(self, job: Job, kept: Kept, memory: Any, back: Tensor) -> Tensor | None:
        """R{delta} a^T + delta R{a}^T, and W^T R{delta} + V^T delta."""
        assert kept.first is not None
        assert kept.second is not None
        a, delta = kept.first.flatten(0, 1), kept.second.flatten(0, 1)
        wide = back.view(len(a), -1)  # [m, R out]
        if job.bias is not None:
            self._add(job, "bias", wide.sum(0))
        if job.weight is not None:
            self._multiply_add(job, "weight", wide.T, a)
            if memory is not None:
                self._multiply_add(job, "across", delta.T, memory.view(len(a), -1))
        if memory is None:
            return None
        assert job.own is not None
        below = back.view(-1, len(job.own)) @ job.own
        if job.across is not None:
            below.view(len(a), -1).addmm_(delta, job.across)
        return self.scatter(below.view(len(a), job.count, -1), len(back))

    def finish(self, job: Job) -> dict[str, Tensor]:
        """The sums."""
        found = {}
        if job.bias is not None:
            found["bias"] = job.sums["bias"].view(job.count, -1)
        if job.weight is not None:
            total = job.sums["weight"].view(job.count, -1, job.weight.shape[1])
            if "across" in job.sums:
                across = job.sums["across"].view(total.shape[1], job.count, -1)
                total = total.add_(across.transpose(0, 1))
            found["weight"] = self.shaped(total)
        return found

    def shaped(self, matrices: Tensor) -> Tensor:
        """[R, out, K] as [R, *weight shape]."""
        return matrices

    @staticmethod
    def _add(job: Job, name: str, term: Tensor) -> None:
        job.sums[name] = job.sums[name].add_(term) if name in job.sums else term

    @staticmethod
    def _multiply_add(job: Job, name: str, x: Tensor, y: Tensor) -> None:
        job.sums[name] = job.sums[name].addmm_(x, y) if name in job.sums else x @ y


class Convolution(Linear):
    """nn.Conv2d in one group, padded with zeros: a linear layer on patches."""

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
        (top, left), (down, right) = self._padding, self._stride
        padded = pad(along, (0, 0, 0, 0, left, left, top, top)) if top or left else along
        heights, widths = (
            (size - d * (k - 1) - 1) // s + 1
            for size, d, k, s in zip(
                padded.shape[1:3], self._dilation, self._kernel, self._stride, strict=True
            )
        )
        n, y, x, r, c = padded.stride()
        (h, w), (dy, dx) = self._kernel, self._dilation
        patches = padded.as_strided(
            (len(along), heights, widths, along.shape[3], h, w, along.shape[4]),
            (n, y * down, x * right, r, y * dy, x * dx, c),
            padded.storage_offset(),
        )
        return patches.flatten(4)

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


def _behind(a: Tensor) -> Tensor:
    """[n, C, ...] as [n, ..., 1, C]."""
    return a.movedim(1, -1).unsqueeze(-2).contiguous()


KINDS: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: Linear,
    nn.Conv2d: Convolution,
    nn.Flatten: Flatten,
    **dict.fromkeys((*PIECEWISE_LINEAR, *SMOOTH), Elementwise),
    **dict.fromkeys(IDLE, Layer),
}
"""Of each type of module, but not of its subclasses, the layer."""
