"""The weighted loss of a model over a data set, as a function of chosen parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from fastif_ext.data import (
    BATCH,
    Data,
    batch_rows,
    batches,
    cut,
    device_of,
    evaluating,
    merged,
    tensors_of,
    to_device,
    tree_map,
)
from fastif_ext.device import full_precision, kept_rng, memory_for
from fastif_ext.hooks import first_argument, hooked
from fastif_ext.memory import reuse_freed_memory
from fastif_ext.parameters import Params, Selection

Loss = Callable[[Any, Tensor], Tensor]
Chunk = tuple[Any, Tensor, Tensor | None]
PROBE = 64  # rows on which the model and the loss are tried before the real work


class WeightedLoss:
    """``sum_i w_i loss(z_i)`` over a data set, chunk by chunk, as a function of some parameters.

    What Hessian and mean_gradient share. The model is called functionally, in eval mode, on copies
    of its parameters and buffers: nothing of it is changed, and later changes of it change nothing
    here.
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
        reuse_freed_memory()
        self.model, self.loss_fn = model, loss_fn
        self.selection = Selection(model, params)
        self.leaves = {
            name: p.detach().clone().requires_grad_() for name, p in self.selection.touched.items()
        }
        first = next(iter(self.leaves.values()))
        self.device, self.dtype = first.device, first.dtype
        for name, p in self.leaves.items():
            if p.dtype != self.dtype or p.device != self.device:
                raise ValueError(
                    f"the selected parameters must share dtype and device; {name} is {p.dtype} on "
                    f"{p.device}, others are {self.dtype} on {self.device}"
                )
        self._others = {
            name: t.detach().clone()
            for name, t in [*model.named_parameters(), *model.named_buffers()]
            if name not in self.leaves
        }
        self._places = _places(model)
        limit = chunk_size or BATCH
        holding = memory_for(
            f"the rows of data, all of which are held on {self.device}",
            "choose fewer of them (a sampler, or rows of the data set)",
        )
        with holding, kept_rng(self.device):  # every DataLoader draws a seed
            self._batches = [
                (to_device(inputs, self.device), targets.to(self.device))
                for inputs, targets in merged(map(_require_targets, batches(data, limit)), limit)
            ]
        self.rows = sum(batch_rows(inputs) for inputs, _ in self._batches)
        if self.rows == 0:
            raise ValueError("data has no rows")
        self.weights = None if weights is None else self._check_weights(weights)
        self._connected = False  # whether any loss so far depended on the leaves
        self._try_loss()
        _require_mean(loss_fn)

    def chunks(self, size: int | None = None) -> Iterator[Chunk]:
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
                yield cut(inputs, part), targets[part], w
            row += n

    def outputs(self, inputs: Any, values: Sequence[Tensor] | None = None) -> Any:
        """The model's outputs, the leaves at other `values` where these are given."""
        named = isinstance(inputs, Mapping)
        leaves = self.leaves if values is None else dict(zip(self.leaves, values, strict=True))
        tensors = {**self._others, **leaves}
        return functional_call(
            self.model,
            {place: tensors[name] for place, name in self._places.items()},
            args=() if named else (inputs,),
            kwargs=dict(inputs) if named else None,
            tie_weights=False,
        )

    def loss(self, inputs: Any, targets: Tensor, weights: Tensor | None) -> Tensor:
        """The chunk's part of the sum. Without weights every row weighs 1/n."""
        outputs = self.outputs(inputs)
        if weights is None:
            return self.loss_fn(outputs, targets) * (batch_rows(inputs) / self.rows)
        return (per_example(self.loss_fn, outputs, targets) * weights).sum()

    def gradient(self, chunk: Chunk, *, graph: bool) -> list[Tensor]:
        """Gradient of a chunk's loss, one tensor per leaf; differentiable again with `graph`."""
        leaves = list(self.leaves.values())
        with differentiable(self.model), torch.enable_grad():
            value = self.loss(*chunk)
            if not value.requires_grad:
                return [torch.zeros_like(leaf, requires_grad=False) for leaf in leaves]
            self.note_connection()
            return list(
                torch.autograd.grad(value, leaves, create_graph=graph, materialize_grads=True)
            )

    def shares(self, outputs: Tensor, weights: Tensor | None) -> Tensor:
        """A chunk's weights [b], in the outputs' dtype. Without weights every row weighs 1/n."""
        if weights is None:
            return outputs.new_full((len(outputs),), 1 / self.rows)
        return weights.to(outputs.dtype)

    def values(self) -> dict[str, Tensor]:
        """Parameters and buffers of the model by name, as they are here: the leaves and others."""
        return {**self._others, **self.leaves}

    def held(self) -> Iterator[Tensor]:
        """The tensors that the object keeps: parameters, buffers, data, weights."""
        yield from self.values().values()
        for batch in self._batches:
            yield from tensors_of(batch)
        if self.weights is not None:
            yield self.weights

    def note_connection(self) -> None:
        """Something was seen to depend on the leaves."""
        self._connected = True

    def require_connection(self) -> None:
        """After a pass over all chunks: some loss must have depended on the selected parameters."""
        if not self._connected:
            raise ValueError(
                f"the loss does not depend on the selected parameters "
                f"({', '.join(self.leaves)}); is the model or loss_fn under no_grad or detached?"
            )

    def _check_weights(self, weights: Tensor) -> Tensor:
        if not isinstance(weights, Tensor) or weights.shape != (self.rows,):
            got = (
                f"shape {list(weights.shape)}"
                if isinstance(weights, Tensor)
                else type(weights).__name__
            )
            raise ValueError(
                f"weights must be a tensor with one entry for each of the {self.rows} rows of "
                f"data, got {got}"
            )
        if not weights.isfinite().all():
            raise ValueError("weights must be finite, got NaN or infinite values")
        return weights.detach().to(self.device, self.dtype)

    def _try_loss(self) -> None:
        """Try the first rows: the outputs must come out the same twice, the loss must be a mean."""
        inputs, targets, _ = next(self.chunks(PROBE))
        with differentiable(self.model), torch.no_grad(), kept_rng(self.device):
            outputs, again = self.outputs(inputs), self.outputs(inputs)
            if not all(
                torch.allclose(a, b, equal_nan=True)
                for a, b in zip(tensors_of(outputs), tensors_of(again), strict=True)
            ):
                raise ValueError(
                    "model gives different outputs for the same inputs in eval mode; make it "
                    "reproducible (no dropout outside nn.Dropout, no random augmentation inside it)"
                )
            whole = self.loss_fn(outputs, targets)
            if not isinstance(whole, Tensor) or whole.dim() != 0:
                got = f"shape {list(whole.shape)}" if isinstance(whole, Tensor) else type(whole)
                raise ValueError(
                    f"loss_fn must return the mean loss, a scalar tensor; got {got}. Use "
                    f"reduction='mean'"
                )
            n = batch_rows(inputs)
            k = n // 2
            if k == 0:
                return
            parts = (
                self.loss_fn(cut(outputs, slice(0, k)), targets[:k]) * (k / n),
                self.loss_fn(cut(outputs, slice(k, n)), targets[k:]) * ((n - k) / n),
            )
        size = float(parts[0].abs() + parts[1].abs())
        tolerance = max(1e-4, torch.finfo(self.dtype).eps ** 0.5)
        if abs(float(whole - parts[0] - parts[1])) > tolerance * size:
            raise ValueError(
                f"loss_fn must be a mean over examples: on the first {n} rows it gives "
                f"{float(whole):.6g}, and by halves {float(parts[0] + parts[1]):.6g}. Use "
                f"reduction='mean'; for a class-weighted loss, average reduction='none' yourself"
            )


def _require_mean(loss_fn: Loss) -> None:
    """Refuse torch's losses that say of themselves that they are no mean over examples."""
    if type(loss_fn).__module__ != nn.CrossEntropyLoss.__module__:
        return
    if getattr(loss_fn, "reduction", "mean") in ("sum", "none"):
        raise ValueError(
            f"loss_fn must return the mean loss, a scalar tensor; it has reduction="
            f"{getattr(loss_fn, 'reduction', None)!r}. Use reduction='mean'"
        )
    classes = isinstance(loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss))
    if classes and getattr(loss_fn, "weight", None) is not None:
        raise ValueError(
            "loss_fn must be a mean over examples, and one with class weights divides by the sum "
            "of the weights; for a class-weighted loss, average reduction='none' yourself"
        )


def _places(model: nn.Module) -> dict[str, str]:
    """Every place of a parameter or buffer in a module, each module once, and the tensor's name.

    functional_call finds shared tensors itself, but where one module has two names it does not put
    back what was there.
    """
    named = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return {
        f"{prefix}.{own}" if prefix else own: named[id(t)]
        for prefix, module in model.named_modules()
        for own, t in [
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ]
    }


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Eval mode, full precision, attention in plain operations; all is as before at the end.

    Fused attention kernels lack second and forward-mode derivatives. An embedding's row for padding
    has no gradient; forward mode would give it one.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    padded = [
        m for m in model.modules() if isinstance(m, nn.Embedding) and m.padding_idx is not None
    ]
    with (
        hooked(padded, _padding_is_constant),
        evaluating(model),
        full_precision(device_of(model)),
        sdpa_kernel(SDPBackend.MATH),
    ):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def _padding_is_constant(table: nn.Embedding, args: Any, named: Any, output: Tensor) -> Tensor:
    assert table.padding_idx is not None
    return torch.where(
        (first_argument(args, named) == table.padding_idx)[..., None], output.detach(), output
    )


def is_cross_entropy(loss_fn: Loss) -> bool:
    """Whether the loss is cross-entropy over classes, without class weights or ignored classes.

    A subclass of nn.CrossEntropyLoss, or one with hooks, is a loss of its own.
    """
    if type(loss_fn) is nn.CrossEntropyLoss:
        hooks = loss_fn._forward_hooks or loss_fn._forward_pre_hooks
        return loss_fn.weight is None and loss_fn.ignore_index < 0 and not hooks
    return loss_fn is cross_entropy


def target_mass(loss_fn: Loss, targets: Tensor) -> Tensor:
    """What the second derivative of each row's cross-entropy is multiplied by, [n].

    0 where the label is the one that is ignored; of probabilities their sum.
    """
    if targets.dim() == 1:
        return targets != getattr(loss_fn, "ignore_index", -100)
    smoothing = getattr(loss_fn, "label_smoothing", 0.0)
    return (1 - smoothing) * targets.sum(1) + smoothing


def per_example(loss_fn: Loss, outputs: Any, targets: Tensor) -> Tensor:
    """Loss of each example, [b]: the mean-reducing loss_fn applied to one example at a time."""
    if is_cross_entropy(loss_fn) and isinstance(outputs, Tensor) and outputs.dim() == 2:
        smoothing = getattr(loss_fn, "label_smoothing", 0.0)
        return cross_entropy(outputs, targets, reduction="none", label_smoothing=smoothing)

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
        model: as for Hessian, and so are all that follow.
        loss_fn: loss_fn(outputs, targets) -> mean loss.
        data: (inputs, targets), a Dataset or a DataLoader.
        weights: one per row, the w_i; by default 1/n each.
        params: the selected parameters.
        chunk_size: rows per backward pass.

    Returns:
        [p], the selected parameters in named_parameters() order.

    Raises:
        ValueError: as Hessian does.

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
    gradient = torch.zeros(total.selection.dim, dtype=total.dtype, device=total.device)
    for chunk in total.chunks(chunk_size):
        rows = batch_rows(chunk[0])
        with memory_for(f"the gradient of {rows} rows", f"pass a chunk_size= below {rows}"):
            parts = total.gradient(chunk, graph=False)
        gradient += total.selection.join([g[None] for g in parts])[0]
    total.require_connection()
    return gradient


def _require_targets(batch: tuple[Any, Any]) -> tuple[Any, Tensor]:
    inputs, targets = batch
    if targets is None:
        raise ValueError("data must give (inputs, targets); its batches hold no targets")
    return inputs, torch.as_tensor(targets)
