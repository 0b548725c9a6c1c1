"""Training of the small networks: minibatches with Adam, or L-BFGS to a minimum."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from fastif_ext.data import BATCH, Data, batches, call, device_of, evaluating, to_device
from fastif_ext.device import kept_rng, memory_for
from fastif_ext.memory import reuse_freed_memory

_LBFGS_CHUNK = 20  # iterations between two looks at the gradient
_LBFGS_HISTORY = 50


@dataclass(frozen=True)
class LbfgsResult:
    """Where train_lbfgs stopped."""

    loss: float
    """The objective: mean cross-entropy + l2 / 2 |theta|^2."""
    gradient_norm: float
    """The Euclidean norm of its gradient."""
    iterations: int
    """L-BFGS iterations taken."""
    converged: bool
    """Whether gradient_norm is at most tol."""


def train(
    model: nn.Module,
    dataset: TensorDataset | tuple[Tensor, Tensor],
    *,
    epochs: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    progress: bool = False,
    device: torch.device | str | None = None,
) -> list[float]:
    """Train a classifier in place: Adam on shuffled minibatches, the rate falling as a cosine.

    The objective is the mean cross-entropy + weight_decay / 2 |theta|^2. The same seed gives the
    same weights on one device (shuffling and dropout follow it); torch's global random state is
    left as it was. With BatchNorm a last batch of one row, which has no variance, is left out of
    its epoch. After an interrupt (Ctrl-C) the model is as the steps so far have made it.

    Args:
        model: maps inputs [n, ...] to logits [n, C]. Trained in train mode; each module's own mode
            is restored afterwards.
        dataset: (inputs [n, ...], int64 labels [n]), as a TensorDataset or a pair.
        epochs: passes over the data.
        batch_size: rows of a step.
        lr: Adam's first learning rate; it falls to 0 in the last step.
        weight_decay: l2 coefficient, added to the gradient.
        seed: of the shuffling and of dropout.
        progress: show a progress bar over the steps.
        device: where to train; the model is moved there, and stays. By default where it is. A data
            set that takes less than a quarter of a GPU's free memory is copied there for the
            training.

    Returns:
        The mean cross-entropy of each epoch's batches, in the course of training.

    Raises:
        ValueError: a bad number, an empty data set, inputs and labels of different length.
        TypeError: the data set is not made of two tensors.
        RuntimeError: the loss is no longer finite.

    Example:
        >>> from fastif_ext import datasets, models, training
        >>> digits = datasets.load("digits")
        >>> model = models.build("mlp", dtype=digits.train.tensors[0].dtype)
        >>> losses = training.train(model, digits.train, epochs=5, lr=0.01)
        >>> losses[-1] < losses[0], training.accuracy(model, digits.test) > 0.9
        (True, True)
    """
    inputs, targets = _tensors(dataset)
    _check_range(epochs=epochs, batch_size=batch_size, lr=lr)
    _check_range(zero=True, weight_decay=weight_decay)
    where = device_of(model) if device is None else torch.device(device)
    model.to(where)
    inputs, targets = _near(where, inputs, targets)
    reuse_freed_memory()
    splits = _splits(len(targets), batch_size, model)
    optimizer = torch.optim.Adam(_trainable(model), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(splits))
    shuffle = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    bar = tqdm(total=epochs * len(splits), desc="training", unit="step", disable=not progress)
    with bar, _training(model), _seeded(seed, where):
        for _ in range(epochs):
            order = torch.randperm(len(targets), generator=shuffle).to(targets.device)
            total, rows = torch.zeros((), device=where), 0
            for part in splits:
                batch = order[part]
                with memory_for(f"a step of {len(batch)} rows", "use a smaller batch_size"):
                    x, y = to_device((inputs[batch], targets[batch]), where)
                    loss = F.cross_entropy(model(x), y)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                schedule.step()
                total = total + loss.detach() * len(batch)  # read once an epoch: no wait for a GPU
                rows += len(batch)
                bar.update()
            losses.append(float(total) / rows)
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
            if not math.isfinite(losses[-1]):
                raise RuntimeError(
                    f"train: the loss of epoch {len(losses)} is {losses[-1]}; lower lr (now {lr}) "
                    f"or standardise the inputs, and start from a new model"
                )
    return losses


def train_lbfgs(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    l2: float = 0.0,
    max_iter: int = 2000,
    tol: float = 1e-6,
    progress: bool = False,
) -> LbfgsResult:
    """Train a classifier in place to a minimum: L-BFGS on all rows at once.

    Minimises mean cross-entropy + l2 / 2 |theta|^2 over the trainable parameters until the norm of
    its gradient is at most tol. Influence functions assume such a minimum; it takes float64 to
    get there. The model runs in eval mode, as the objective must be a function. After
    an interrupt (Ctrl-C) the model holds the last iterate that was looked at (every 20 iterations).

    Args:
        model: maps inputs [n, ...] to logits [n, C].
        inputs: [n, ...], on the model's device.
        targets: int64 [n].
        l2: coefficient of |theta|^2 / 2, biases included.
        max_iter: L-BFGS iterations at most.
        tol: on the Euclidean norm of the gradient.
        progress: show a progress bar over the iterations.

    Raises:
        ValueError: a bad number, no rows, inputs and targets of different length.
        RuntimeError: the objective is not finite.

    Warns:
        RuntimeWarning: tol was not reached.

    Source: Liu & Nocedal 1989, torch.optim.LBFGS with a strong-Wolfe line search.

    Example:
        >>> import torch
        >>> from fastif_ext import training
        >>> x, y = torch.eye(3, dtype=torch.float64), torch.arange(3)
        >>> model = torch.nn.Linear(3, 3).double()
        >>> result = training.train_lbfgs(model, x, y, l2=0.01)
        >>> result.converged, result.gradient_norm <= 1e-6
        (True, True)
    """
    _check_rows(inputs, targets)
    _check_range(max_iter=max_iter, tol=tol)
    _check_range(zero=True, l2=l2)
    params = _trainable(model)

    def objective() -> Tensor:
        for p in params:
            p.grad = None
        loss = F.cross_entropy(model(inputs), targets)
        if l2:
            loss = loss + l2 / 2 * sum((p * p).sum() for p in params)
        loss.backward()
        return loss.detach()

    def look() -> tuple[float, float]:
        loss = float(objective())
        grads = [p.grad.flatten() for p in params if p.grad is not None]
        return loss, float(torch.linalg.vector_norm(torch.cat(grads)))

    iterations, full_steps, stalled = 0, False, False
    good = [p.detach().clone() for p in params]
    bar = tqdm(total=max_iter, desc="L-BFGS", disable=not progress)
    try:
        with bar, evaluating(model):
            loss, norm = look()
            optimizer = _lbfgs(params)
            options = optimizer.param_groups[0]
            while norm > tol and iterations < max_iter and not stalled:
                options["max_iter"] = min(_LBFGS_CHUNK, max_iter - iterations)
                before = optimizer.state[params[0]].get("n_iter", 0)
                optimizer.step(objective)
                done = optimizer.state[params[0]]["n_iter"] - before
                last = loss, norm
                loss, norm = look()
                if full_steps and not norm < last[1]:
                    _restore(params, good)
                    loss, norm = last
                    break
                if not math.isfinite(loss + norm):
                    break
                good = [p.detach().clone() for p in params]
                iterations += done
                stalled = full_steps and norm > last[1] / 2
                if done < options["max_iter"] and not full_steps:
                    # The objective no longer changes in its last digits, so a line search is blind;
                    # its gradient has digits left: go on with full quasi-Newton steps.
                    full_steps = True
                    options.update(line_search_fn=None, tolerance_change=0.0)
                bar.update(done)
                bar.set_postfix(loss=f"{loss:.6f}", gradient=f"{norm:.1e}")
    except BaseException:
        _restore(params, good)
        raise
    finally:
        for p in params:
            p.grad = None
    if not math.isfinite(loss + norm):
        _restore(params, good)
        raise RuntimeError(
            f"train_lbfgs: the objective is {loss}, its gradient norm {norm}; check inputs for nan "
            f"and inf, or start from smaller weights or with a larger l2 (now {l2})"
        )
    if norm > tol:
        why = (
            f"the objective no longer changes in {params[0].dtype}; use a larger tol"
            + ("" if params[0].dtype == torch.float64 else " or float64")
            if iterations < max_iter
            else f"raise max_iter (now {max_iter}) or l2 (now {l2}), or use a larger tol"
        )
        warnings.warn(
            f"train_lbfgs: the gradient norm is {norm:.2e} after {iterations} iterations, "
            f"tol = {tol}: {why}",
            RuntimeWarning,
            stacklevel=2,
        )
    return LbfgsResult(loss, norm, iterations, norm <= tol)


def accuracy(model: nn.Module, dataset: Data, *, batch_size: int = BATCH) -> float:
    """The share of rows whose largest logit is that of their label, the model in eval mode.

    Args:
        model: maps inputs to logits [n, C].
        dataset: (inputs, labels), a Dataset or a DataLoader of such.
        batch_size: rows of one forward pass, where dataset is no DataLoader.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: the data set is empty.

    Example:
        >>> import torch
        >>> from fastif_ext import training
        >>> training.accuracy(torch.nn.Identity(), (torch.eye(4), torch.tensor([0, 1, 2, 0])))
        0.75
    """
    where, rows = device_of(model), 0
    right = torch.zeros((), dtype=torch.int64, device=where)
    with evaluating(model), torch.no_grad():
        for inputs, labels in batches(dataset, batch_size):
            predicted = call(model, to_device(inputs, where)).argmax(1)
            right += (predicted == labels.to(where)).sum()
            rows += len(labels)
    if not rows:
        raise ValueError("dataset is empty; accuracy needs at least one row")
    return int(right) / rows


def _lbfgs(params: list[nn.Parameter]) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(
        params,
        lr=1.0,
        max_eval=1 << 30,
        tolerance_grad=0.0,
        tolerance_change=1e-14,
        history_size=_LBFGS_HISTORY,
        line_search_fn="strong_wolfe",
    )


def _restore(params: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)


def _tensors(dataset: Any) -> tuple[Tensor, Tensor]:
    """The inputs and labels of a TensorDataset or pair."""
    tensors = dataset.tensors if isinstance(dataset, TensorDataset) else dataset
    if not isinstance(tensors, tuple) or len(tensors) != 2:
        what = type(dataset).__name__ + (
            f" of {len(tensors)}" if isinstance(tensors, tuple) else ""
        )
        raise TypeError(
            f"dataset must be TensorDataset(inputs, labels) or a pair of tensors, got a {what}"
        )
    _check_rows(*tensors)
    return tensors


def _check_rows(inputs: Tensor, targets: Tensor) -> None:
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
        raise TypeError(
            f"inputs and targets must be tensors, got {type(inputs).__name__} and "
            f"{type(targets).__name__}"
        )
    if targets.dtype != torch.int64 or targets.dim() != 1:
        raise ValueError(
            f"targets must be int64 labels [n], got {targets.dtype} {tuple(targets.shape)}"
        )
    if len(inputs) != len(targets) or not len(targets):
        raise ValueError(
            f"inputs has {len(inputs)} rows and targets {len(targets)}; both need the same "
            f"number, at least 1"
        )


def _check_range(*, zero: bool = False, **values: float) -> None:
    """Every value finite and above zero, or with zero=True not below it."""
    for name, value in values.items():
        if not (0 < value < math.inf or (zero and value == 0)):
            raise ValueError(
                f"{name} = {value} must be finite and {'at least 0' if zero else 'positive'}"
            )


def _splits(n: int, batch_size: int, model: nn.Module) -> list[slice]:
    """Where an epoch's shuffled rows are cut into batches."""
    splits = [slice(i, i + batch_size) for i in range(0, n, batch_size)]
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if normed and n % batch_size == 1 and len(splits) > 1 and batch_size > 1:
        splits.pop()
    return splits


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError(
            "model has no parameter with requires_grad=True; there is nothing to train"
        )
    return params


def _near(where: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on the GPU, where they fit well; else as they are: a copy per step waits."""
    if where.type != "cuda":
        return tensors
    size = sum(t.numel() * t.element_size() for t in tensors)
    return to_device(tensors, where) if 4 * size < torch.cuda.mem_get_info(where)[0] else tensors


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Train mode; each module's own mode, and no gradients, afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        model.zero_grad(set_to_none=True)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global generators of the CPU and of the device seeded, and restored afterwards."""
    with kept_rng(device):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
