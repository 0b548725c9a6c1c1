"""The weighted loss of a model over a data set, as a function of chosen parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastif_ext.data import BATCH, Data, batch_rows, batches, evaluating, to_device, tree_map
from fastif_ext.parameters import Params, Selection

Loss = Callable[[Any, Tensor], Tensor]


class WeightedLoss:
    """``sum_i w_i loss(z_i)`` over a data set, chunk by chunk, as a function of some parameters.

    What Hessian and mean_gradient share. The model is called functionally, in eval mode, on
    detached copies of its parameters: nothing of it is changed.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        data: Data,
        *,
        weights: Tensor | None = None,
        params: Params = None,
        chunk_size: int | None = None,
    ) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.model, self.loss_fn = model, loss_fn
        self.selection = Selection(model, params)
        self.leaves = {
            name: p.detach().clone().requires_grad_() for name, p in self.selection.touched.items()
        }
        first = next(iter(self.leaves.values()))
        self.device, self.dtype = first.device, first.dtype
        self._batches = [
            (to_device(inputs, self.device), targets.to(self.device))
            for inputs, targets in map(_require_targets, batches(data, chunk_size or BATCH))
        ]
        self.rows = sum(batch_rows(inputs) for inputs, _ in self._batches)
        if self.rows == 0:
            raise ValueError("data has no rows")
        if weights is not None:
            if weights.shape != (self.rows,):
                raise ValueError(
                    f"weights must have one entry for each of the {self.rows} rows of data, got "
                    f"shape {list(weights.shape)}"
                )
            if not weights.isfinite().all():
                raise ValueError("weights must be finite")
            weights = weights.detach().to(self.device, self.dtype)
        self.weights = weights
        self._others = {
            name: t.detach()
            for name, t in [*model.named_parameters(), *model.named_buffers()]
            if name not in self.leaves
        }

    def chunks(self, size: int | None = None) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
        """(inputs, targets, weights) in order, batches cut to at most `size` rows."""
        row = 0
        for inputs, targets in self._batches:
            n = batch_rows(inputs)
            for i in range(0, n, size or n):
                part = slice(i, min(n, i + (size or n)))
                w = (
                    None
                    if self.weights is None
                    else self.weights[row + part.start : row + part.stop]
                )
                yield tree_map(lambda t, part=part: t[part], inputs), targets[part], w
            row += n

    def outputs(self, inputs: Any) -> Any:
        """The model's outputs as a function of the leaves."""
        return functional_call(
            self.model,
            {**self._others, **self.leaves},
            args=() if isinstance(inputs, dict) else (inputs,),
            kwargs=inputs if isinstance(inputs, dict) else None,
        )

    def loss(self, inputs: Any, targets: Tensor, weights: Tensor | None) -> Tensor:
        """The chunk's part of the sum. Without weights every row weighs 1/n."""
        outputs = self.outputs(inputs)
        if weights is None:
            return self.loss_fn(outputs, targets) * (batch_rows(inputs) / self.rows)
        return (per_example(self.loss_fn, outputs, targets) * weights).sum()

    def gradient(self, chunk: tuple[Any, Tensor, Tensor | None], *, graph: bool) -> list[Tensor]:
        """Gradient of a chunk's loss, one tensor per leaf; differentiable again with `graph`."""
        with evaluating(self.model), torch.enable_grad():
            value = self.loss(*chunk)
            if value.dim() != 0:
                raise ValueError(
                    f"loss_fn must return the mean loss, a scalar; got shape {list(value.shape)}. "
                    f"Use reduction='mean'"
                )
            return list(
                torch.autograd.grad(
                    value, list(self.leaves.values()), create_graph=graph, materialize_grads=True
                )
            )


def per_example(loss_fn: Loss, outputs: Any, targets: Tensor) -> Tensor:
    """Loss of each example, [b]: the mean-reducing loss_fn applied to one example at a time."""

    def one(output: Any, target: Tensor) -> Tensor:
        return loss_fn(tree_map(lambda t: t.unsqueeze(0), output), target.unsqueeze(0))

    return torch.func.vmap(one)(outputs, targets)


def mean_gradient(
    model: nn.Module,
    loss_fn: Loss,
    data: Data,
    *,
    weights: Tensor | None = None,
    params: Params = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Gradient of the mean loss over a data set (or of ``sum_i w_i loss(z_i)``).

    Args:
        model, loss_fn, data, weights, params, chunk_size: as for Hessian.

    Returns:
        [p], the selected parameters in named_parameters() order.

    Example:
        >>> import torch, fastif_ext as fi
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.eye(2)
        >>> loss = lambda out, target: (out - target).mean()
        >>> fi.mean_gradient(model, loss, (x, torch.zeros(2, 1)))
        tensor([0.5000, 0.5000])
    """
    total = WeightedLoss(
        model, loss_fn, data, weights=weights, params=params, chunk_size=chunk_size
    )
    gradient = None
    for chunk in total.chunks():
        part = total.selection.join([g[None] for g in total.gradient(chunk, graph=False)])[0]
        gradient = part if gradient is None else gradient + part
    assert gradient is not None
    return gradient


def _require_targets(batch: tuple[Any, Any]) -> tuple[Any, Tensor]:
    inputs, targets = batch
    if targets is None:
        raise ValueError("data must give (inputs, targets); its batches hold no targets")
    return inputs, torch.as_tensor(targets)
