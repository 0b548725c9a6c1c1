"""Which parameters an operator or an update acts on, and how they lie in one long vector."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

Params = Iterable[str] | nn.Module | Tensor | None


class Selection:
    """A choice among a model's trainable parameters, in named_parameters() order.

    All trainable parameters laid end to end form a vector of length ``total``; the selected entries
    of it form a vector of length ``dim``.

    Args:
        model: the model.
        params: None (all trainable parameters), names or fnmatch patterns, a module of the model
            (its parameters), or a bool mask of length ``total``.

    Raises:
        ValueError: nothing is selected, a pattern matches nothing, a mask of the wrong length.
    """

    def __init__(self, model: nn.Module, params: Params = None) -> None:
        trainable = {k: p for k, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("model has no parameter with requires_grad=True")
        self.total = sum(p.numel() for p in trainable.values())
        self.mask: Tensor | None = None  # over `touched`, where only part of a tensor is selected
        whole: dict[str, bool | Tensor] = {}
        if params is None:
            whole = dict.fromkeys(trainable, True)
        elif isinstance(params, Tensor):
            whole = self._from_mask(trainable, params)
        elif isinstance(params, nn.Module):
            own = {id(p) for p in params.parameters()}
            whole = {k: True for k, p in trainable.items() if id(p) in own}
        else:
            whole = self._from_patterns(trainable, params)
        if not sum(trainable[k].numel() for k in whole):
            raise ValueError("params selects no trainable parameter of the model")
        self.touched = {k: trainable[k] for k in whole}
        if any(isinstance(w, Tensor) for w in whole.values()):
            self.mask = torch.cat(
                [
                    w if isinstance(w, Tensor) else torch.ones(p.numel(), dtype=torch.bool)
                    for w, p in zip(whole.values(), self.touched.values(), strict=True)
                ]
            )
        sizes = [p.numel() for p in self.touched.values()]
        self.dim = sum(sizes) if self.mask is None else int(self.mask.sum())
        self._sizes = sizes
        self._found: dict[tuple[str, torch.device], Tensor] = {}
        self._place = torch.zeros(self.total, dtype=torch.bool)
        start = 0
        for name, p in trainable.items():
            choice = whole.get(name, False)
            end = start + p.numel()
            self._place[start:end] = choice
            start = end

    @staticmethod
    def _from_patterns(
        trainable: Mapping[str, Tensor], patterns: Iterable[str]
    ) -> dict[str, bool | Tensor]:
        if isinstance(patterns, str):
            raise TypeError(f"params must be a list of names or patterns, got the str {patterns!r}")
        if not isinstance(patterns, Iterable):
            raise TypeError(
                f"params must be None, a list of names or patterns, a module or a bool mask, got "
                f"{type(patterns).__name__}"
            )
        patterns = list(patterns)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in trainable):
                raise ValueError(
                    f"params: {pattern!r} matches no trainable parameter; there are: "
                    f"{', '.join(trainable)}"
                )
        return {k: True for k in trainable if any(fnmatchcase(k, p) for p in patterns)}

    def _from_mask(self, trainable: Mapping[str, Tensor], mask: Tensor) -> dict[str, bool | Tensor]:
        if mask.dtype != torch.bool or mask.shape != (self.total,):
            raise ValueError(
                f"params: a mask must be bool of length {self.total}, the number of trainable "
                f"parameters; got {mask.dtype} of shape {list(mask.shape)}"
            )
        whole: dict[str, bool | Tensor] = {}
        parts = mask.cpu().split([p.numel() for p in trainable.values()])
        for (name, _), part in zip(trainable.items(), parts, strict=True):
            if part.all():
                whole[name] = True
            elif part.any():
                whole[name] = part
        return whole

    def split(self, v: Tensor) -> list[Tensor]:
        """[R, dim] to one tensor [R, *shape] per touched parameter, zero where not selected."""
        if self.mask is not None:
            full = v.new_zeros(v.shape[0], len(self.mask))
            v = full.index_copy_(1, self._positions("mask", v.device), v)
        parts = v.split(self._sizes, dim=1)
        return [
            part.reshape(v.shape[0], *p.shape)
            for part, p in zip(parts, self.touched.values(), strict=True)
        ]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor [R, *shape] per touched parameter to [R, dim]."""
        v = torch.cat([t.reshape(t.shape[0], t.shape[1:].numel()) for t in tensors], dim=1)
        return v if self.mask is None else v.index_select(1, self._positions("mask", v.device))

    def restrict(self, v: Tensor) -> Tensor:
        """[..., total] to [..., dim], the selected entries."""
        return v.index_select(-1, self._positions("place", v.device))

    def embed(self, v: Tensor) -> Tensor:
        """[..., dim] to [..., total], zero outside the selection."""
        full = v.new_zeros(*v.shape[:-1], self.total)
        return full.index_copy_(-1, self._positions("place", v.device), v)

    def _positions(self, which: str, device: torch.device) -> Tensor:
        """Where a mask is true, int64, on a device.

        Kept: to index by the mask itself would wait for the device, in every product.
        """
        key = which, device
        if key not in self._found:
            mask = self.mask if which == "mask" else self._place
            assert mask is not None
            self._found[key] = mask.nonzero().flatten().to(device)
        return self._found[key]


def flat_parameters(model: nn.Module) -> Tensor:
    """A copy of all trainable parameters, end to end, [p], in named_parameters() order."""
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def apply_update(model: nn.Module, delta: Tensor, step: float = 1.0) -> nn.Module:
    """A copy of the model with its trainable parameters moved by ``step * delta``.

    Args:
        model: left unchanged.
        delta: [p], all trainable parameters in named_parameters() order.
        step: multiplies delta.

    Returns:
        The moved copy, in the training mode of the original.

    Raises:
        ValueError: delta does not have one entry per trainable parameter.

    Example:
        >>> import torch, fastif_ext as fi
        >>> model = torch.nn.Linear(2, 1)
        >>> moved = fi.apply_update(model, torch.ones(3), step=0.5)
        >>> torch.allclose(moved.weight, model.weight + 0.5)
        True
    """
    moved = copy.deepcopy(model)
    trainable = [p for p in moved.parameters() if p.requires_grad]
    total = sum(p.numel() for p in trainable)
    if delta.shape != (total,):
        raise ValueError(
            f"apply_update: delta has shape {list(delta.shape)}, the model has {total} trainable "
            f"parameters"
        )
    with torch.no_grad():
        for p, change in zip(trainable, delta.split([p.numel() for p in trainable]), strict=True):
            p.add_(change.view_as(p).to(p), alpha=step)
    return moved
