"""The exact Hessian of a linear layer under cross-entropy, from its inputs and logits alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastif_ext import ops
from fastif_ext.curvature.factor import output_directions, preconditioner_of, rows_worth_taking
from fastif_ext.curvature.operator import check_vector
from fastif_ext.extract import extract
from fastif_ext.preconditioner import LowRankPreconditioner


class LinearSoftmaxHessian:
    """Hessian of the mean cross-entropy in the weights of the last linear layer.

    Exact and without autograd: all that a product needs are the layer's inputs and the softmax of
    its outputs. A symmetric operator on vectors of C d (+ C) entries, the weight [C, d] and then
    the bias [C], as named_parameters() of an nn.Linear has them. It is positive semi-definite.

    Args:
        features: inputs of the layer, [n, d], float32 or float64.
        logits: its outputs, [n, C], of the same dtype.
        weights: one per row, the w_i of ``sum_i w_i loss(z_i)``; by default 1/n each.
        bias: whether the layer has a bias.

    Attributes:
        dim, rows, dtype, device: of the operator and its data.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; NaN.

    Example:
        >>> import torch, fastif_ext as fi
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(50, 4)
        >>> S = fi.LinearSoftmaxHessian(x, model(x).detach())
        >>> H = fi.Hessian(model, torch.nn.functional.cross_entropy, (x, torch.arange(50) % 3))
        >>> torch.allclose(S @ torch.ones(15), H @ torch.ones(15), atol=1e-6)
        True
    """

    def __init__(
        self,
        features: Tensor,
        logits: Tensor,
        *,
        weights: Tensor | None = None,
        bias: bool = True,
    ) -> None:
        name = "LinearSoftmaxHessian"
        for argument, value in (("features", features), ("logits", logits)):
            if not isinstance(value, Tensor) or value.dim() != 2:
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name}: {argument} must be a tensor [n, ...], got {got}")
        if len(features) != len(logits) or len(features) == 0:
            raise ValueError(
                f"{name}: features has {len(features)} rows, logits has {len(logits)}; they must "
                f"be equal and not 0"
            )
        if features.dtype != logits.dtype or features.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name}: features are {features.dtype}, logits {logits.dtype}; both must be "
                f"float32 or both float64"
            )
        if features.device != logits.device:
            raise ValueError(
                f"{name}: features are on {features.device}, logits on {logits.device}; move both "
                f"to one device"
            )
        if not features.isfinite().all() or logits.isnan().any():
            raise ValueError(f"{name}: features or logits hold NaN or infinite values")
        n = len(features)
        if weights is None:
            weights = features.new_full((n,), 1 / n)
        elif weights.shape != (n,) or not weights.isfinite().all():
            raise ValueError(
                f"{name}: weights must be finite, one for each of the {n} rows; got shape "
                f"{list(weights.shape)}"
            )
        self.features = features.detach()
        self.probs = logits.detach().softmax(1)
        self.weights = weights.detach().to(features.device, features.dtype)
        self.bias, self.rows = bias, n
        self.classes, self.width = logits.shape[1], features.shape[1]
        self.dim = self.classes * (self.width + bias)
        self.dtype, self.device = features.dtype, features.device
        self.recordable = True  # see fastif_ext.graphs

    def renew(self) -> None:
        """There is no graph to drop."""

    @classmethod
    def of_last_layer(
        cls,
        model: nn.Module,
        loader: DataLoader[Any],
        *,
        weights: Tensor | None = None,
        progress: bool = False,
    ) -> LinearSoftmaxHessian:
        """The operator of a network's last nn.Linear, on its device, in one pass over a loader.

        Args:
            model: maps inputs to logits; its last nn.Linear must be what makes them.
            loader: a DataLoader that does not shuffle.
            weights: one per row.
            progress: show a progress bar.
        """
        layer = last_linear(model)
        got = extract(model, loader, layer="penultimate", progress=progress)
        assert got.features is not None
        own = nn.functional.linear(
            got.features[:1],
            layer.weight.detach().cpu(),
            None if layer.bias is None else layer.bias.detach().cpu(),
        )
        if own.shape != got.logits[:1].shape or not torch.allclose(
            own, got.logits[:1], rtol=1e-3, atol=1e-4
        ):
            raise ValueError(
                "LinearSoftmaxHessian: the model's outputs are not those of its last nn.Linear; "
                "something follows it. Use Hessian or GaussNewton"
            )
        features, logits = (t.to(layer.weight.device) for t in (got.features, got.logits))
        return cls(features, logits, weights=weights, bias=layer.bias is not None)

    def to(self, device: torch.device | str) -> LinearSoftmaxHessian:
        """The operator itself, its data moved to a device."""
        self.features, self.probs = self.features.to(device), self.probs.to(device)
        self.weights = self.weights.to(device)
        self.device = self.features.device  # with its number, as those of vectors have
        return self

    def preconditioner(self, damping: float, right_hand_sides: int) -> LowRankPreconditioner | None:
        """What makes conjugate gradients take fewer products; see CurvatureOperator."""
        count = rows_worth_taking(self.rows, self.dim, right_hand_sides)
        chosen = output_directions(self.probs, self.weights, count) if count else None
        if chosen is None:
            return None
        weight = chosen.directions[:, :, None] * self.features[chosen.rows][:, None, :]
        parts = [weight.flatten(1), chosen.directions] if self.bias else [weight.flatten(1)]
        return preconditioner_of(torch.cat(parts, 1), damping)

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with v of shape [p] or [R, p]."""
        check_vector(v, self.dim, self.dtype, self.device)
        batch = (v if v.dim() == 2 else v[None]).detach()
        if batch.shape[0] == 0:
            return batch.clone()
        split = self.classes * self.width
        matrix = batch[:, :split].view(-1, self.classes, self.width)
        if self.bias:
            matrix = torch.cat([matrix, batch[:, split:, None]], dim=2)
        product = ops.linear_softmax_hvp(self.features, self.probs, matrix, self.weights)
        if self.bias:
            flat = torch.cat([product[:, :, :-1].flatten(1), product[:, :, -1]], dim=1)
        else:
            flat = product.flatten(1)
        return flat if v.dim() == 2 else flat[0]


def last_linear(model: nn.Module) -> nn.Linear:
    """The last nn.Linear of a model, in the order of its modules."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("the model has no nn.Linear; use Hessian or GaussNewton on its parameters")
    return layers[-1]
