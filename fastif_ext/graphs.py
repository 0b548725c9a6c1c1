"""Products with an operator, recorded once as a CUDA graph and played from then on.

A product with the Hessian of a small network is hundreds of kernels of a few microseconds:
launching them one by one takes longer than running them. A solver makes hundreds of products of one
shape on one subset, so their kernels can be recorded and launched as one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from fastif_ext.spectrum import apply

LOG = logging.getLogger(__name__)
WARM = 3  # products of a shape that are made before it is recorded: libraries set themselves up
SHAPES = 4  # recordings kept at a time; each holds the memory that a product takes

CudaGraph = bool | str
"""Of a solver: "auto" records what can be recorded, True insists on it, False does not record."""


class Recorder(Protocol):
    """What runs and records work for a device."""

    def run(self, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Do the work where it will be recorded."""

    def record(self, work: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """The results' place, and what does the work again, into that place."""


class CudaRecorder:
    """Work on a stream of its own, as recording asks for, in order with the caller's stream.

    Autograd runs the backward pass of an operation on the stream of its forward pass. What was made
    on the default stream, which cannot be recorded, cannot be either: `run` has to come first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()  # one for all: they never run at a time

    def run(self, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Do the work on the stream."""
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            results = work()
        caller.wait_stream(self._stream)
        return results

    def record(self, work: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """Record the work as a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        # thread_local: what other threads do meanwhile (a DataLoader pins memory) is none of it
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._stream,
                capture_error_mode="thread_local",
            ),
        ):
            results = work()
        caller.wait_stream(self._stream)
        return results, graph.replay


class RecordedProducts:
    """An operator whose products are recorded, shape by shape, and played.

    The first few products of a shape are made in the ordinary way. Where recording fails, all are,
    and a warning is logged with the reason.

    Args:
        H: the operator, with ``H.recordable`` true: its products have static shapes and never wait
            for the device, and ``H.renew()`` drops what was made on another stream.
        recorder: of the device.
        strict: raise where recording fails.
    """

    recordable = False  # what plays a recording cannot be part of one

    def __init__(self, H: Any, recorder: Recorder, *, strict: bool = False) -> None:
        self.H, self._recorder, self._strict = H, recorder, strict
        self._seen: dict[Any, int] = {}
        self._played: dict[Any, tuple[Tensor, list[Tensor], Callable[[], None]]] = {}
        self._failed = False
        H.renew()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.H, name)  # dim, dtype, device ...

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with v of shape [p] or [R, p]."""
        parts = self.products(v if v.dim() == 2 else v[None])
        product = torch.cat([part.flatten(1) for part in parts], dim=1)  # a copy, even of one
        return product if v.dim() == 2 else product[0]

    def products(self, v: Tensor) -> list[Tensor]:
        """The product with v [R, p] in parts [R, ...], overwritten by the next product."""
        if self._failed:
            return _parts(self.H, v)
        key = v.shape, v.dtype, v.device
        if key in self._played:
            place, results, play = self._played[key]
            place.copy_(v)
            play()
            return results
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        if seen > WARM and len(self._played) < SHAPES and v.numel():
            if self._record(key, v):
                return self.products(v)
            return _parts(self.H, v)
        return self._recorder.run(lambda: _parts(self.H, v))

    def close(self) -> None:
        """Drop the recordings, and what H made for them."""
        self._played.clear()
        self.H.renew()

    def _record(self, key: Any, v: Tensor) -> bool:
        place = v.detach().clone()
        try:
            results, play = self._recorder.record(lambda: _parts(self.H, place))
        except RuntimeError as error:
            if self._strict:
                raise RuntimeError(
                    f"cuda_graph=True, but a product with {type(self.H).__name__} cannot be "
                    f"recorded: {error}; use cuda_graph='auto' or False"
                ) from error
            LOG.warning(
                "products with %s are not recorded as a CUDA graph and run kernel by kernel: %s",
                type(self.H).__name__,
                error,
            )
            self._failed = True
            self.close()
            return False
        self._played[key] = place, results, play
        return True


@contextmanager
def recorded(H: Any, cuda_graph: CudaGraph, device: torch.device) -> Iterator[Any]:
    """H with its products recorded, for as long as the block lasts; or H itself.

    Args:
        H: any operator.
        cuda_graph: "auto", True or False; see CudaGraph.
        device: where the products are made.

    Raises:
        ValueError: cuda_graph is none of these, or True where H cannot be recorded.
    """
    if cuda_graph not in ("auto", True, False):
        raise ValueError(f"cuda_graph must be 'auto', True or False, got {cuda_graph!r}")
    if isinstance(H, RecordedProducts) or cuda_graph is False:
        yield H
        return
    recorder = recorder_of(device)
    if recorder is None or not getattr(H, "recordable", False):
        if cuda_graph is True:
            raise ValueError(
                f"cuda_graph=True, but the products of a {type(H).__name__} on {device} cannot be "
                f"recorded: it takes a CUDA device, and an operator that keeps its graph (a larger "
                f"graph_memory=); use cuda_graph='auto'"
            )
        yield H
        return
    recording = RecordedProducts(H, recorder, strict=cuda_graph is True)
    try:
        yield recording
    finally:
        recording.close()


def recorder_of(device: torch.device) -> Recorder | None:
    """What records on the device; None where nothing does."""
    return CudaRecorder(device) if device.type == "cuda" else None


def _parts(H: Any, v: Tensor) -> list[Tensor]:
    return H.products(v) if hasattr(H, "products") else [apply(H, v)]
