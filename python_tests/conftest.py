"""Fixtures shared by the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


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
