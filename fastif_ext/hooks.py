"""Hooks on layers while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def hooked(
    modules: Iterable[nn.Module], hook: Callable[..., Any], *, first: bool = False
) -> Iterator[None]:
    """hook(module, args, kwargs, output) after each call of the modules, gone at the end.

    Args:
        modules: the modules to look at.
        hook: what it returns, if it is not None, goes on in place of the output.
        first: before the hooks that are there, which may change what comes out; or after them.
    """
    handles = [m.register_forward_hook(hook, with_kwargs=True, prepend=first) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_argument(args: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    """What a layer was called with, by place or by name."""
    return next(iter((*args, *named.values())))
