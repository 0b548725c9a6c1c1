"""Fixtures shared by the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastif_ext as fi


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


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that the kernels are for; skips what is not there."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")
        if not fi.build_info()["cuda"]:
            pytest.skip("fastif_ext was built without CUDA")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _global_rng_is_left_alone() -> Iterator[None]:
    """Every test starts from one seed, so that none depends on the order of the others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
