"""Curvature and gradients over rows that ranks share: sums over ranks of what each has."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext.curvature import make_curvature
from fastif_ext.curvature.operator import check_vector
from fastif_ext.data import Data, count
from fastif_ext.distributed.facts import model_bits
from fastif_ext.distributed.ranks import Ranks, opened
from fastif_ext.distributed.shards import loader_part, part_of, shard
from fastif_ext.loaders import batch_range
from fastif_ext.objective import Loss
from fastif_ext.objective import mean_gradient as mean_gradient_here
from fastif_ext.parameters import Params, Selection


class DistributedOperator:
    """``sum_r factor_r H_r``: each rank has a curvature operator on its rows, all have the product.

    A product is the rank's own, and a sum over ranks, which gives all of them the same bits: so
    fastif_ext.lissa, cg, exact and damping="auto" work on it as they are, called with the same
    arguments on all ranks, and take the same steps on each.

    Args:
        local: the rank's operator, with ``local @ v``, ``dim``, ``rows``, ``dtype`` and ``device``.
        factor: what it counts for; by default its share of all ranks' rows, right for operators of
            the mean over their own rows. 1 where its weights are shares of the whole already.
        group: a process group, the default one if None; or Ranks, which have a timeout.

    Attributes:
        dim, dtype, device: of the local operator. rows: those of all ranks.

    Raises:
        RankError: ranks disagree (in the operator, or later in v), one failed, or one does not
            come.

    Example:
        >>> import torch, torch.distributed as dist, fastif_ext as fi
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model, own = torch.nn.Linear(2, 1), (torch.randn(9, 2), torch.randn(9, 1))
        >>> local = fi.Hessian(model, torch.nn.functional.mse_loss, own)
        >>> H = fi.distributed.DistributedOperator(local)
        >>> torch.equal(H @ torch.ones(3), local @ torch.ones(3))
        True
        >>> dist.destroy_process_group()
    """

    recordable = False  # a CUDA graph cannot wait for other ranks

    def __init__(
        self,
        local: Any,
        *,
        factor: float | None = None,
        group: dist.ProcessGroup | Ranks | None = None,
    ) -> None:
        self.local, self.ranks = local, opened(group)
        self.dim, self.dtype, self.device = local.dim, local.dtype, local.device
        said = self.ranks.meet(
            "DistributedOperator",
            [local.rows, factor is None],
            dim=self.dim,
            dtype=self.dtype,
            factor="given" if factor is not None else "by rows",
            # the ranks make a solver's decisions each for itself, so they must round alike
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )
        self.rows = sum(rows for rows, _ in said)
        self.factor = local.rows / self.rows if factor is None else factor

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with v of shape [p] or [R, p], the same v on all ranks."""
        with self.ranks.telling("H @ v"):
            check_vector(v, self.dim, self.dtype, self.device)
            product = (self.local @ v) * self.factor
        self.ranks.meet("H @ v", v=v)
        return self.ranks.all_reduce("the sum of H @ v", product)


class _NoRows:
    """The operator on no rows."""

    rows = 0

    def __init__(self, zero: Tensor) -> None:
        self.dim, self.dtype, self.device = len(zero), zero.dtype, zero.device

    def __matmul__(self, v: Tensor) -> Tensor:
        return torch.zeros_like(v)


def curvature(
    name: str,
    model: nn.Module,
    loss_fn: Loss,
    data: Data,
    *,
    weights: Tensor | None = None,
    params: Params = None,
    chunk_size: int | None = None,
    group: dist.ProcessGroup | Ranks | None = None,
) -> DistributedOperator:
    """The curvature operator of that name over some rows, every rank on its part of them.

    Args:
        name: "hessian", "gauss-newton" or "linear-softmax", as for fastif_ext.influence.
        model: the network, the same on all ranks.
        loss_fn: loss_fn(outputs, targets) -> mean loss.
        data: all rows, the same on all ranks; a rank reads its own only.
        weights: one per row of data.
        params: the selected parameters.
        chunk_size: rows per chunk; see fastif_ext.Hessian.
        group: a process group, the default one if None; or Ranks.

    Returns:
        DistributedOperator.

    Raises:
        ValueError: as fastif_ext.Hessian.
        RankError: ranks disagree, one failed, or one does not come.

    Example:
        >>> import torch, torch.distributed as dist, fastif_ext as fi
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model, data = torch.nn.Linear(2, 1), (torch.randn(9, 2), torch.randn(9, 1))
        >>> H = fi.distributed.curvature("hessian", model, torch.nn.functional.mse_loss, data)
        >>> fi.cg(H, torch.ones(3), damping="auto").converged
        True
        >>> dist.destroy_process_group()
    """
    ranks = opened(group)
    part, own, factor = _part("curvature", ranks, model, loss_fn, data, weights, params)
    with ranks.telling("curvature"):
        local: Any = (
            make_curvature(
                name, model, loss_fn, part, weights=own, params=params, chunk_size=chunk_size
            )
            if factor
            else _NoRows(_zero(model, params))
        )
    return DistributedOperator(local, factor=factor, group=ranks)


def mean_gradient(
    model: nn.Module,
    loss_fn: Loss,
    data: Data,
    *,
    weights: Tensor | None = None,
    params: Params = None,
    chunk_size: int | None = None,
    group: dist.ProcessGroup | Ranks | None = None,
) -> Tensor:
    """Gradient of the mean loss over some rows, every rank over its part of them.

    Args:
        model: as for curvature, and so are all that follow.
        loss_fn: loss_fn(outputs, targets) -> mean loss.
        data: all rows, the same on all ranks.
        weights: one per row of data.
        params: the selected parameters.
        chunk_size: rows per backward pass.
        group: a process group, the default one if None; or Ranks.

    Returns:
        [p], the same bits on all ranks.

    Raises:
        ValueError: as fastif_ext.mean_gradient.
        RankError: ranks disagree, one failed, or one does not come.
    """
    ranks = opened(group)
    part, own, factor = _part("mean_gradient", ranks, model, loss_fn, data, weights, params)
    with ranks.telling("mean_gradient"):
        gradient = (
            factor
            * mean_gradient_here(
                model, loss_fn, part, weights=own, params=params, chunk_size=chunk_size
            )
            if factor
            else _zero(model, params)
        )
    return ranks.all_reduce("the sum of mean_gradient", gradient)


def _zero(model: nn.Module, params: Params) -> Tensor:
    """The zero vector over the selected parameters."""
    selection = Selection(model, params)
    return next(iter(selection.touched.values())).new_zeros(selection.dim)


def _part(
    what: str,
    ranks: Ranks,
    model: nn.Module,
    loss_fn: Loss,
    data: Data,
    weights: Tensor | None,
    params: Params,
) -> tuple[Any, Tensor | None, float]:
    """This rank's rows, their weights, and what the mean or weighted sum over them counts for."""
    with ranks.telling(what):
        part: Any
        if isinstance(data, DataLoader):
            batches, rows, n, cuts = loader_part(data, ranks.rank, ranks.size)
            part = batch_range(data, batches.start, batches.stop)
        else:
            n, cuts = count(data), []
            rows = shard(n, ranks.rank, ranks.size)
            part = part_of(data, rows)
        if n == 0:
            raise ValueError(f"{what}: data has no rows")
        if weights is not None and weights.shape != (n,):
            raise ValueError(
                f"{what}: weights must have one entry for each of the {n} rows of data, got shape "
                f"{list(weights.shape)}"
            )
        selection = Selection(model, params)
        facts = {
            "length of the data": n,
            "rows cut at": cuts,
            "weights": weights,
            "model": model_bits(model),
            "parameters": f"{selection.dim} of {', '.join(selection.touched)}",
            "loss_fn": loss_fn,
        }
    ranks.meet(what, **facts)
    own = None if weights is None else weights[rows.start : rows.stop]
    share = len(rows) / n
    return part, own, share if own is None or not share else 1.0
