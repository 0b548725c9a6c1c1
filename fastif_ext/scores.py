"""Influence scores: what every training example does to the loss of every test example."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastif_ext.curvature import check_curvature, last_linear, make_curvature
from fastif_ext.data import Data, Rows, batch_rows, count, cut, take
from fastif_ext.device import memory_for
from fastif_ext.directional import DirectionalDerivatives
from fastif_ext.graphs import CudaGraph, recorded
from fastif_ext.influence import check_rows, make_solver, subset_of
from fastif_ext.objective import Loss, WeightedLoss
from fastif_ext.parameters import Params
from fastif_ext.solvers import SolveResult
from fastif_ext.spectrum import resolve_damping

if TYPE_CHECKING:
    from fastif_ext.samplers import SubsetSampler

TOGETHER = 64  # test examples solved for in one batch


def influence_scores(
    model: nn.Module,
    loss_fn: Loss,
    train: Data,
    test: Data,
    *,
    params: Params = None,
    sampler: SubsetSampler | None = None,
    curvature: Any = "hessian",
    solver: str = "cg",
    damping: float | str = "auto",
    tol: float = 1e-3,
    max_iter: int | None = None,
    test_chunk: int = TOGETHER,
    train_chunk: int | None = None,
    cuda_graph: CudaGraph = "auto",
    progress: bool = False,
) -> Tensor:
    """Influence of every training example on the loss of every test example.

    The score of test example t and training example i is

        g_t^T (H_S + damping I)^-1 g_i      (Koh and Liang 2017)

    with g the gradients of their losses. Positive: the training example *helps*; leaving it out of
    n raises the loss of t, to first order by score / n, in the unit of the loss (nats for
    cross-entropy). Where training stopped short of a minimum, or decayed weights, a constant is
    left over for each t: compare within a row.

    One system is solved per test example, in batches of `test_chunk`. The products with the
    training gradients are directional derivatives: no example's gradient is formed but the test
    examples' own, `test_chunk` at a time, and, a pass at a time, those in parameters outside of
    linear, convolution, embedding and norm layers (class tokens, nn.MultiheadAttention).

    Args:
        model: the trained model; left as it was.
        loss_fn: loss_fn(outputs, targets) -> mean loss.
        train: the training examples to score: (inputs, targets), a Dataset or a DataLoader.
        test: the test examples, likewise.
        params: the selected parameters; see Hessian.
        sampler: chooses the rows of `train` for H_S, with their weights; None takes all.
        curvature: "hessian", "gauss-newton", "linear-softmax" (the last nn.Linear, which `params`
            then defaults to), or an operator with ``H @ v`` over the selected parameters, which
            `sampler` then does not apply to.
        solver: "cg", "lissa" or "exact".
        damping: a number in the units of H, or "auto" (one for all test examples).
        tol: relative residual of each system.
        max_iter: most iterations of a solve.
        test_chunk: right-hand sides solved together; memory grows with test_chunk x p.
        train_chunk: training examples in one pass; by default as many as keep what the layers give
            out below 4 million numbers, 32 to 8,192; fewer where many parameters are outside of
            layers.
        cuda_graph: whether the solver's products are recorded on CUDA; see fastif_ext.lissa.
        progress: show a progress bar.

    Returns:
        [n_test, n_train], of the parameters' dtype and on their device.

    Raises:
        ValueError: arguments that do not fit.
        SolverDivergence: the damped curvature is indefinite.

    Example:
        >>> import torch, fastif_ext as fi
        >>> model = torch.nn.Linear(1, 1, bias=False)  # loss (theta x - y)^2, H = 2 mean x^2
        >>> _ = model.weight.data.fill_(1.0)
        >>> x, y = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [2.0]])
        >>> loss = torch.nn.functional.mse_loss
        >>> fi.influence_scores(model, loss, (x, y), (x, y), damping=0.0).round(decimals=3)
        tensor([[ 2., -2.],
                [-2.,  2.]])
    """
    _check_chunks("influence_scores", test_chunk, 1 if train_chunk is None else train_chunk)
    job = _Job(model, loss_fn, train, params, sampler, curvature, solver, damping, tol, max_iter)
    tests = WeightedLoss(model, loss_fn, test, params=job.params)
    examples = WeightedLoss(model, loss_fn, train, params=job.params)
    derivatives = DirectionalDerivatives(examples)
    if train_chunk is None:
        train_chunk = derivatives.rows()
    scores = torch.empty(tests.rows, examples.rows, dtype=examples.dtype, device=examples.device)
    row = 0
    passes = _passes(tests, test_chunk) * _passes(examples, train_chunk)
    with (
        recorded(job.H, cuda_graph, examples.device) as job.H,
        tqdm(total=passes, desc="scores", disable=not progress) as bar,
    ):
        for chunk in tests.chunks(test_chunk):
            with _memory(batch_rows(chunk[0]), "right-hand sides", "test_chunk"):
                x = job.solve(_gradients(tests, chunk))
            directions = examples.selection.split(x)
            column = 0
            for inputs, targets, _ in examples.chunks(train_chunk):
                n = batch_rows(inputs)
                with _memory(n, f"training examples along {len(x)} directions", "train_chunk"):
                    part = derivatives(inputs, targets, directions).detach()
                scores[row : row + len(x), column : column + n] = part
                column += n
                bar.update()
            row += len(x)
    return scores


def self_influence(
    model: nn.Module,
    loss_fn: Loss,
    train: Rows,
    *,
    rows: Tensor | None = None,
    params: Params = None,
    sampler: SubsetSampler | None = None,
    curvature: Any = "hessian",
    solver: str = "cg",
    damping: float | str = "auto",
    tol: float = 1e-3,
    max_iter: int | None = None,
    chunk: int = TOGETHER,
    cuda_graph: CudaGraph = "auto",
    progress: bool = False,
) -> Tensor:
    """Influence of training examples on their own loss: large for mislabelled and odd ones.

    g_i^T (H_S + damping I)^-1 g_i, never negative where the damped curvature is definite; divided
    by n it predicts by how much the example's loss rises when it is left out.

    Args:
        model: as for influence_scores, and so are all that are not explained here.
        loss_fn: loss_fn(outputs, targets) -> mean loss.
        train: the training set, (inputs, targets) or a map-style Dataset.
        rows: int64, the rows of `train` to score; by default all.
        params: the selected parameters.
        sampler: chooses the rows of `train` for H_S.
        curvature: "hessian", "gauss-newton", "linear-softmax", or an operator.
        solver: "cg", "lissa" or "exact".
        damping: a number or "auto".
        tol: relative residual of each system.
        max_iter: most iterations of a solve.
        chunk: examples solved for together.
        cuda_graph: whether the solver's products are recorded on CUDA.
        progress: show a progress bar.

    Returns:
        [number of rows], of the parameters' dtype and on their device.

    Raises:
        ValueError: arguments that do not fit.
        SolverDivergence: the damped curvature is indefinite.

    Example:
        >>> import torch, fastif_ext as fi
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(1.0)
        >>> x, y = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [5.0]])
        >>> fi.self_influence(
        ...     model, torch.nn.functional.mse_loss, (x, y), damping=0.0
        ... ).round(decimals=3)
        tensor([ 2., 32.])
    """
    _check_chunks("self_influence", chunk, chunk)
    job = _Job(model, loss_fn, train, params, sampler, curvature, solver, damping, tol, max_iter)
    chosen = train if rows is None else take(train, check_rows("rows", rows, count(train)))
    examples = WeightedLoss(model, loss_fn, chosen, params=job.params)
    found = []
    with (
        recorded(job.H, cuda_graph, examples.device) as job.H,
        tqdm(total=_passes(examples, chunk), desc="scores", disable=not progress) as bar,
    ):
        for part in examples.chunks(chunk):
            with _memory(batch_rows(part[0]), "right-hand sides", "chunk"):
                g = _gradients(examples, part)
                found.append((job.solve(g) * g).sum(1))
            bar.update()
    return torch.cat(found)


class _Job:
    """The system that all scores of a call share."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        train: Data,
        params: Params,
        sampler: SubsetSampler | None,
        curvature: Any,
        solver: str,
        damping: float | str,
        tol: float,
        max_iter: int | None,
    ) -> None:
        self._solve: Callable[[Any, Tensor, float | str], SolveResult] = make_solver(
            solver, tol=tol, max_iter=max_iter, progress=False
        )
        self.params, self._damping = params, damping
        if isinstance(curvature, str):
            check_curvature(curvature)
            if curvature == "linear-softmax" and params is None:
                self.params = last_linear(model)
            subset, weights = subset_of("sampler", sampler, train)
            self.H = make_curvature(
                curvature, model, loss_fn, subset, weights=weights, params=self.params
            )
        elif sampler is not None:
            raise ValueError("curvature is an operator already; sampler would not be used")
        else:
            self.H = curvature

    def solve(self, gradients: Tensor) -> Tensor:
        """(H_S + damping I)^-1 g for each row; "auto" is settled by the first call."""
        if isinstance(self._damping, str):
            nothing = torch.zeros_like(gradients[:1])  # so that it does not matter which come first
            self._damping, _ = resolve_damping(self.H, nothing, self._damping)
        return self._solve(self.H, gradients, self._damping).x


def _gradients(total: WeightedLoss, chunk: tuple[Any, Tensor, Tensor | None]) -> Tensor:
    """Each example's own gradient, [b, dim]."""
    inputs, targets, _ = chunk
    rows = []
    for i in range(batch_rows(inputs)):
        one = slice(i, i + 1)
        parts = total.gradient((cut(inputs, one), targets[one], None), graph=False)
        rows.append(total.selection.join([g[None] for g in parts]) * total.rows)
    total.require_connection()
    return torch.cat(rows)


def _memory(count: int, what: str, knob: str) -> AbstractContextManager[None]:
    return memory_for(f"{count} {what}", f"pass a {knob}= below {count}")


def _passes(total: WeightedLoss, size: int) -> int:
    return sum(1 for _ in total.chunks(size))


def _check_chunks(name: str, *sizes: int) -> None:
    for size in sizes:
        if size < 1:
            raise ValueError(f"{name}: chunk sizes must be at least 1, got {size}")
