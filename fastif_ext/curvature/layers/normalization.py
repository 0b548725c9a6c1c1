"""Batch normalization in a curvature product: by fixed statistics a factor and a shift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from fastif_ext.curvature.layers.layer import Job, Kept, Layer, Named, channels_behind
from fastif_ext.normalized import normalizes


class BatchNorm(Layer):
    """nn.BatchNorm1d and nn.BatchNorm2d in eval mode, weight (a - mean) / deviation + bias."""

    parameters = frozenset({"weight", "bias"})

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Not without running statistics."""
        return normalizes(module)

    def __init__(self, module: nn.Module, values: Named, places: Mapping[str, int]) -> None:
        super().__init__(module, values, places)
        assert isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
        mean, variance, self._eps = module.running_mean, module.running_var, module.eps
        assert isinstance(mean, Tensor)
        assert isinstance(variance, Tensor)
        self._mean, self._variance = mean.clone(), variance.clone()
        self._scale = (variance + self._eps).rsqrt()

    def fits(self, a: Tensor) -> bool:
        """Rows or images."""
        return a.dim() in (2, 4)

    def run(self, a: Tensor) -> Tensor:
        """The layer's outputs."""
        weight, bias = self.values.get("weight"), self.values.get("bias")
        return batch_norm(a, self._mean, self._variance, weight, bias, eps=self._eps)

    def keep(self, a: Tensor, delta: Tensor | None) -> Kept:
        """Normalized inputs, and the gradient in the outputs."""
        normalized = batch_norm(a, self._mean, self._variance, eps=self._eps)
        return Kept(channels_behind(normalized), None if delta is None else channels_behind(delta))

    def start(self, directions: Named, count: int) -> Job:
        """The directions, and the layer's own weights or 1."""
        job = super().start(directions, count)
        own = self.values.get("weight")
        job.own = torch.ones_like(self._scale) if own is None else own.detach()
        return job

    def push(self, job: Job, kept: Kept, along: Tensor | None) -> tuple[Tensor | None, Any]:
        """V a + b' + W R{a} with normalized a, and for a Hessian this R{a}."""
        a, delta = kept
        assert a is not None
        assert job.own is not None
        memory = None
        if along is None:
            result = a.new_zeros(job.count, *a.shape)
        elif delta is None or job.weight is None:
            result = along.mul_(self._scale * job.own)
        else:
            memory = along.mul_(self._scale)
            result = memory * job.own
        if job.weight is not None:
            result.addcmul_(_spread(job.weight, a), a)
        if job.bias is not None:
            result.add_(_spread(job.bias, a))
        return result, memory

    def gather(self, job: Job, kept: Kept, memory: Any, back: Tensor) -> None:
        """R{delta} a + delta R{a}."""
        a, delta = kept
        assert a is not None
        places = tuple(range(1, back.dim() - 1))
        if job.bias is not None:
            job.add("bias", back.sum(places))
        if job.weight is not None:
            job.add("weight", (back * a).sum(places))
        if memory is not None:
            job.add("weight", (memory * delta).sum(places))

    def pull(self, job: Job, kept: Kept, memory: Any, back: Tensor) -> Tensor:
        """W R{delta} + V delta, times the scale."""
        a, delta = kept
        assert a is not None
        assert job.own is not None
        if delta is None or job.weight is None:
            return back.mul_(self._scale * job.own)
        return back.mul_(job.own).addcmul_(_spread(job.weight, a), delta).mul_(self._scale)

    def example_gradients(self, kept: Kept) -> dict[str, Tensor]:
        """delta a, summed over places."""
        a, delta = kept
        assert a is not None
        assert delta is not None
        places = tuple(range(1, a.dim() - 1))
        found = {"weight": delta * a, "bias": delta}
        return {k: found[k].sum(places) if places else found[k] for k in self.places}


def _spread(values: Tensor, a: Tensor) -> Tensor:
    """[R, C] as [R, 1, ..., C], for rows and places alike."""
    return values.view(len(values), *[1] * (a.dim() - 1), -1)
