"""Influence scores, every rank for its part of the training examples."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from fastif_ext.curvature import check_curvature, last_linear
from fastif_ext.data import Data, Rows, count
from fastif_ext.distributed.curvature import curvature as shared_curvature
from fastif_ext.distributed.ranks import Ranks, opened
from fastif_ext.distributed.shards import part_of, shard
from fastif_ext.influence import subset_of
from fastif_ext.objective import Loss
from fastif_ext.parameters import Params
from fastif_ext.samplers import SubsetSampler
from fastif_ext.scores import influence_scores as scores_here


def influence_scores(
    model: nn.Module,
    loss_fn: Loss,
    train: Rows,
    test: Data,
    *,
    params: Params = None,
    sampler: SubsetSampler | None = None,
    curvature: str = "hessian",
    gather: bool = True,
    progress: bool = False,
    group: dist.ProcessGroup | Ranks | None = None,
    **solve: Any,
) -> Tensor:
    """fastif_ext.influence_scores with the training examples, and those of H_S, shared by ranks.

    Args:
        model: as there, the same on all ranks, and so are all that are not explained here.
        loss_fn: loss_fn(outputs, targets) -> mean loss.
        train: all training examples; a rank scores those of ``shard(n, rank, size)``.
        test: the test examples.
        params: the selected parameters.
        sampler: chooses the rows of `train` for H_S, the same on all ranks.
        curvature: "hessian", "gauss-newton" or "linear-softmax".
        gather: give all ranks all columns; otherwise each its own, for what does not fit one.
        progress: show a progress bar, on rank 0.
        group: a process group, the default one if None; or Ranks, which have a timeout.
        **solve: solver, damping, tol, max_iter, test_chunk, train_chunk.

    Returns:
        [n_test, n_train], the same on all ranks; or [n_test, rows of this rank].

    Raises:
        ValueError, SolverDivergence: as fastif_ext.influence_scores.
        RankError: ranks disagree, one failed, or one does not come.

    Example:
        >>> import torch, torch.distributed as dist, fastif_ext as fi
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model, data = torch.nn.Linear(2, 1), (torch.randn(9, 2), torch.randn(9, 1))
        >>> loss = torch.nn.functional.mse_loss
        >>> fi.distributed.influence_scores(model, loss, data, data).shape
        torch.Size([9, 9])
        >>> dist.destroy_process_group()
    """
    ranks = opened(group)
    with ranks.telling("influence_scores"):
        check_curvature(curvature)
        if curvature == "linear-softmax" and params is None:
            params = last_linear(model)
        subset, weights = subset_of("sampler", sampler, train)
        n = count(train)
        rows = shard(n, ranks.rank, ranks.size)
    with ranks.together("influence_scores", **{"length of the data": n}, **solve):
        H = shared_curvature(
            curvature, model, loss_fn, subset, weights=weights, params=params, group=ranks
        )
        # A rank without rows takes part in the products all the same: it scores one, for
        # nobody.
        scores = scores_here(
            model,
            loss_fn,
            part_of(train, rows or range(1)),
            test,
            params=params,
            curvature=H,
            progress=progress and ranks.rank == 0,
            **solve,
        )[:, : len(rows)]
    if not gather:
        return scores
    whole = ranks.gather_rows("influence_scores: gather", scores.T.cpu().contiguous())
    assert whole is not None
    return whole.T.contiguous().to(scores.device)
