"""Linear layers in a curvature product: two matrix products up, two down, in a Hessian four."""

from __future__ import annotations

from typing import Any

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

    def keep(self, a: Tensor, delta: Tensor | None) -> Kept:
        """Inputs and gradient in the outputs."""
        return Kept(a, delta)

    def start(self, directions: Named, count: int) -> Job:
        """The directions, and the layer's own weights [out, K]."""
        job = super().start(directions, count)
        job.own = self.values["weight"].detach()
        return job

    def push(self, job: Job, kept: Kept, along: Tensor | None) -> tuple[Tensor | None, Any]:
        """V a + b' + W R{a}, and for a Hessian R{a}."""
        assert kept.first is not None
        assert job.own is not None
        result = None if along is None else along @ job.own.T
        if job.weight is not None:
            bias = None if job.bias is None else job.bias.flatten()
            wide = linear(kept.first, job.weight.flatten(0, 1), bias)  # [n, R out]
            term = wide.unflatten(1, (job.count, -1)).transpose(0, 1)
            result = term.contiguous() if result is None else result.add_(term)
        elif job.bias is not None:
            term = job.bias[:, None]
            if result is None:
                result = term.repeat(1, len(kept.first), 1)  # its own memory, for one row too
            else:
                result.add_(term)
        return result, None if kept.second is None or job.weight is None else along

    def gather(self, job: Job, kept: Kept, memory: Any, back: Tensor) -> None:
        """R{delta} a^T + delta R{a}^T."""
        assert kept.first is not None
        if job.bias is not None:
            job.add("bias", back.sum(1))
        if job.weight is not None:
            wide = back.transpose(0, 1).flatten(1)  # [n, R out]
            job.add("weight", (wide.T @ kept.first).unflatten(0, (job.count, -1)))
        if memory is not None:
            assert kept.second is not None
            delta = kept.second.expand(job.count, -1, -1)
            job.sums["weight"].baddbmm_(delta.mT, memory)

    def pull(self, job: Job, kept: Kept, memory: Any, back: Tensor) -> Tensor:
        """W^T R{delta} + V^T delta."""
        assert job.own is not None
        below = back @ job.own
        if kept.second is None or job.weight is None:
            return below
        return below.baddbmm_(kept.second.expand(job.count, -1, -1), job.weight)

    def example_gradients(self, kept: Kept) -> dict[str, Tensor]:
        """delta a^T."""
        a, delta = kept
        assert a is not None
        assert delta is not None
        found = {"weight": delta[:, :, None] * a[:, None], "bias": delta}
        return {name: found[name] for name in self.places}
