"""Linear layers in a Hessian product: two matrix products up, four down."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from fastif_ext.curvature.layers.layer import Job, Kept, Layer, Named, behind


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
        gathered = self.gather(behind(a))
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

    def example_gradients(self, kept: Kept) -> dict[str, Tensor]:
        """delta a^T, summed over places."""
        a, delta = kept
        assert a is not None
        assert delta is not None
        found = {}
        if "weight" in self.places:
            found["weight"] = self.shaped(delta.transpose(1, 2) @ a)
        if "bias" in self.places:
            found["bias"] = delta.sum(1)
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
