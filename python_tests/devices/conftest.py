"""A device that is not the CPU, for machines without a GPU.

Its tensors are CPU tensors in disguise: torch takes them for tensors on a device named "simulated",
every operation checks that no CPU tensor is mixed in, and notes where a GPU would make the host
wait, or would have to be sent data. So the Python code runs with real values and control flow as on
a GPU, but for what asks whether a device is "cuda".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastif_ext import device as device_module
from fastif_ext.ops import hvp, kmeans, sample, sampling

NAME = "simulated"
WAITING = {  # operations whose result, or its size, the host reads
    *("_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "is_nonzero"),
    *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Traffic:
    """What passed between host and device."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.uploads: list[str] = []


TRAFFIC = Traffic()


class Disguised(Tensor):
    """A CPU tensor, `raw`, that passes for one on the device."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Disguised:
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        self.raw = raw
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Disguised({self.raw})"

    def tolist(self) -> Any:
        """As of a plain tensor: one transfer."""
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Where the numbers are."""
        return self.raw.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Disguised:
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _perform(operation, args, kwargs or {})


def _perform(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the tensors behind the disguise; its results where they belong."""
    name = operation._schema.name.split("::")[1]
    if name == "_efficientzerotensor":  # has no numbers, which kernels below the disguise miss
        operation = torch.ops.aten.zeros.default
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    ours = [t for t in tensors if isinstance(t, Disguised)]
    theirs = [t for t in tensors if not isinstance(t, Disguised)]
    asked = kwargs.get("device")
    here = bool(ours) if asked is None else torch.device(asked).type == NAME
    generator = kwargs.get("generator")
    if here and generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"{operation}: expected a {NAME!r} generator, got a CPU one")
    _note(name, args, ours, theirs, here)
    disguises = {id(t.raw): t for t in ours}
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    bare = tree_map(lambda t: t.raw if isinstance(t, Disguised) else t, (args, kwargs))
    result = operation(*bare[0], **bare[1])
    if name in ("copy_", "set_"):
        return args[0]

    def disguise(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return disguises[id(t)] if id(t) in disguises else Disguised(t) if here else t

    return tree_map(disguise, result)


def _note(name: str, args: Any, ours: list[Any], theirs: list[Tensor], here: bool) -> None:
    if name == "copy_" and ours and theirs:
        (TRAFFIC.uploads if isinstance(args[0], Disguised) else TRAFFIC.waits).append(name)
    elif name == "_to_copy" and bool(ours) != here:
        (TRAFFIC.uploads if here else TRAFFIC.waits).append(name)
    elif ours and name in INDEXING:
        indices = [t for t in args[1] if t is not None]
        if not isinstance(args[0], Disguised):
            raise RuntimeError(f"{name}: indices on {NAME}:0 into a tensor on the CPU")
        if any(t.dtype in (torch.bool, torch.uint8) for t in indices):
            TRAFFIC.waits.append(name)
        if any(not isinstance(t, Disguised) for t in indices):
            TRAFFIC.uploads.append(name)
    elif ours and name in WAITING:
        TRAFFIC.waits.append(name)
    elif ours and any(t.dim() for t in theirs):
        raise RuntimeError(f"{name}: tensors on {NAME}:0 and on the CPU")


def _register() -> torch.library.Library | None:
    """Make the device known to torch: before its first backward pass, which counts the devices.

    Not beside a GPU: torch would take it for the machine's accelerator.
    """
    try:
        from torch.utils import backend_registration
    except ImportError:
        return None
    if torch.cuda.is_available() or not hasattr(backend_registration, "_DummyBackendModule"):
        return None

    class Module(backend_registration._DummyBackendModule):
        """With a random state, which torch's own tests of operators keep."""

        def get_rng_state(self) -> Tensor:
            return torch.empty(0, dtype=torch.uint8)

        def set_rng_state(self, state: Tensor) -> None:
            pass

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: _perform(op, args, kwargs), "PrivateUse1")
    return library


_LIBRARY = _register()


@contextmanager
def _simulated() -> Iterator[None]:
    """The device, with operators of fastif_ext that take its tensors."""
    if _LIBRARY is None:
        pytest.skip("a GPU is here, or this torch has no devices that are written in Python")
    modules = (hvp, kmeans, sample, sampling)
    original = hvp.check_same_device

    def check_same_device(op: str, **tensors: Tensor | None) -> None:
        given = [t for t in tensors.values() if t is not None]
        if len({t.device for t in given}) > 1:
            original(op, **tensors)  # says what is wrong

    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "check_same_device", check_same_device)
        patch.setattr(device_module, "KERNELS", (*device_module.KERNELS, NAME))
        yield


@pytest.fixture(params=["cpu", NAME, pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on the CPU, on a simulated device, and on a GPU where there is one."""
    if request.param == "cuda":
        request.getfixturevalue("gpu")
    if request.param == NAME:
        with _simulated():
            yield NAME
    else:
        yield request.param


@pytest.fixture
def simulated() -> Iterator[Callable[[Tensor], Tensor]]:
    """Puts a tensor on the simulated device, for tests of what only that can show."""
    with _simulated():
        yield lambda t: t.to(NAME)


@pytest.fixture
def traffic(simulated: Callable[[Tensor], Tensor]) -> Traffic:
    """What passes between host and the simulated device from now on."""
    TRAFFIC.waits.clear()
    TRAFFIC.uploads.clear()
    return TRAFFIC
