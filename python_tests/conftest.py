"""Fixtures shared by the tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

import fastif_ext as fi


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Runs a test on the CPU and, where there is a GPU and a CUDA build, on the GPU."""
    if request.param == "cuda":
        require_gpu()
    return request.param


@pytest.fixture
def everywhere(device: str) -> Iterator[str]:
    """Runs a test on every device: new tensors lie there unless they say otherwise."""
    with torch.device(device) if device != "cpu" else nullcontext():
        yield device


@pytest.fixture
def gpu() -> str:
    """For tests that make sense on a GPU only; mark them `gpu`."""
    require_gpu()
    return "cuda"


def require_gpu() -> None:
    """Skip, and say why."""
    info = fi.build_info()
    if not info["cuda"]:
        pytest.skip(f"no CUDA kernels: {info['cuda_reason']}")
    if not torch.cuda.is_available():
        pytest.skip("CUDA kernels were built, but torch sees no GPU")


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's thread count after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: None) -> None:
    """For modules of many tiny products, which a second thread only slows down."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _global_rng_is_left_alone() -> Iterator[None]:
    """Every test starts from one seed, so that none depends on the order of the others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
