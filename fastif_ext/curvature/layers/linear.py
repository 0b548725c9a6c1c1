"""Linear layers in a Hessian product: two matrix products up, four down."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastif_ext.curvature.layers.layer import Job, Kept, Layer, Named


class Linear(Layer):
    """nn.Linear on rows."""

    parameters = frozenset({"weight", "bias"})

    def fits(self, a: Tensor) -> bool:
        """Only rows."""
        return a.dim() == 2

    def run(self, a: Tensor) -> Tensor:
        """The layer's outputs."""
        return linear(a, self.values["weight"], self.values.get("bias"))

    def keep(self, a: Tensor, delta: Tensor) -> Kept:
        """Inputs and gradient in the outputs."""
        return Kept(a, delta)

    def start(self, directions: Named, count: int) -> Job:
        """The directions, and the layer's own weights [out, K]."""
        job = super().start(directions, count)
        job.own = self.values["weight"].detach()
        return job

    def push(self, job: Job, kept: Kept, along: Tensor | None) -> tuple[Tensor | None, Any]:
        """V a + b' + W R{a}, and R{a}."""
        assert kept.first is not None
        assert job.own is not None
        a = kept.first.expand(job.count, -1, -1)
        result = None
        if job.weight is not None:
            v = job.weight.mT
            result = a @ v if job.bias is None else torch.baddbmm(job.bias[:, None], a, v)
        elif job.bias is not None:
            result = job.bias[:, None].expand(-1, a.shape[1], -1).contiguous()
        if along is not None:
            rows = along.flatten(0, 1)
            if result is None:
                result = (rows @ job.own.T).view(*a.shape[:2], -1)
            else:
                result.view(len(rows), -1).addmm_(rows, job.own.T)
        return result, along

    def pull(self, job: Job, kept: Kept, memory: Any, back: Tensor) -> Tensor | None:
        """R{delta} a^T + delta R{a}^T, and W^T R{delta} + V^T delta."""
        assert kept.first is not None
        assert kept.second is not None
        assert job.own is not None
        a, delta = (t.expand(job.count, -1, -1) for t in (kept.first, kept.second))
        if job.bias is not None:
            job.add("bias", back.sum(1))
        if job.weight is not None:
            _add_product(job, back.mT, a)
            if memory is not None:
                _add_product(job, delta.mT, memory)
        if memory is None:
            return None
        below = (back.flatten(0, 1) @ job.own).view(*a.shape[:2], -1)
        return below if job.weight is None else below.baddbmm_(delta, job.weight)

    def example_gradients(self, kept: Kept) -> dict[str, Tensor]:
        """delta a^T."""
        a, delta = kept
        assert a is not None
        assert delta is not None
        found = {"weight": delta[:, :, None] * a[:, None], "bias": delta}
        return {name: found[name] for name in self.places}


def _add_product(job: Job, x: Tensor, y: Tensor) -> None:
    total = job.sums.get("weight")
    job.sums["weight"] = x @ y if total is None else total.baddbmm_(x, y)
