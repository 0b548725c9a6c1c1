"""Argument checks shared by the operators: errors name the argument, the value and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastif_ext.build import build_info

_CUDA, _NO_CUDA = (build_info()[key] for key in ("cuda", "cuda_reason"))
_ON_CPU = {torch.device("cpu")}
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def shape(t: Tensor) -> str:
    """The shape of `t` as it stands in messages: ``[3, 4]``."""
    return str(list(t.shape))


def check_tensor(
    op: str,
    name: str,
    value: Tensor,
    *,
    dims: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...] = FLOATING,
) -> None:
    """Require a tensor with one of the numbers of dimensions and one of the dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dim() not in dims:
        wanted = " or ".join(f"{d}-D" for d in dims)
        raise ValueError(f"{op}: {name} must be {wanted}, got shape {shape(value)}")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(
            f"{op}: {name} has dtype {value.dtype}; supported: {wanted}. "
            f"Convert it with {name}.to(...)"
        )


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """Require all given tensors on one device, and that fastif_ext has kernels for it."""
    devices = {t.device for t in tensors.values() if t is not None}
    if devices == _ON_CPU:  # the usual case: a microsecond counts in a LiSSA step
        return
    given = {name: t for name, t in tensors.items() if t is not None}
    if len(devices) > 1:
        where = ", ".join(f"{name} on {t.device}" for name, t in given.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {where}")
    device = devices.pop()
    if device.type == "cuda" and not _CUDA:
        raise NotImplementedError(
            f"{op}: tensors are on {device}, but this build of fastif_ext has no CUDA kernels: "
            f"{_NO_CUDA}. Or move the tensors with .cpu()"
        )
    if device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(
            f"{op}: tensors are on {device}; fastif_ext has kernels for cpu and cuda. Move them "
            f"with .cpu()"
        )


def can_read(tensor: Tensor) -> bool:
    """Whether values may be looked at now: not while tracing or while capturing a CUDA graph."""
    if tensor.device.type == "meta" or torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def check_no_grad(op: str, **tensors: Tensor | None) -> None:
    """Refuse tensors that autograd tracks, backward or forward: the operators have neither."""
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        for name, t in tensors.items():
            if t is not None and forward_ad.unpack_dual(t).tangent is not None:
                raise RuntimeError(
                    f"{op} is not differentiable, but {name} carries a forward-mode tangent: pass "
                    f"{name}.detach(), or fastif_ext.reference's twin of {op}"
                )
    if torch.is_grad_enabled():
        for name, t in tensors.items():
            if t is not None and t.requires_grad:
                raise RuntimeError(
                    f"{op} is not differentiable, but {name} requires grad: pass {name}.detach() "
                    f"or call it under torch.no_grad()"
                )


def check_count(op: str, name: str, value: int, *, low: int, high: int | None = None) -> None:
    """Require an integer in [low, high]."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{op}: {name} must be {bounds}, got {value}")


def draw_seed(op: str, seed: int | None, generator: torch.Generator | None) -> int:
    """The integer seed of an operator: `seed` itself, or 63 bits drawn from `generator`.

    Without either, torch's default generator is used, as by torch.multinomial.
    """
    if seed is not None:
        if generator is not None:
            raise ValueError(f"{op}: pass either seed or generator, not both")
        if not isinstance(seed, (int, torch.SymInt)) or isinstance(seed, bool):
            raise TypeError(f"{op}: seed must be an int, got {type(seed).__name__}")
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"{op}: seed must fit in 64 bits, got {seed}")
        return seed
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: inside torch.compile pass seed= (an int); drawing one would sync"
        )
    device = generator.device if generator is not None else "cpu"
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))
