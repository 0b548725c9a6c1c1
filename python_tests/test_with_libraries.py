"""The samplers with captum, pyDVL and a plain DataLoader: what bench/with_libraries.py shows."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import fastif_ext as fi

SOURCE = Path(__file__).parent.parent / "bench" / "with_libraries.py"
NEEDS = "the library is not installed: pip install captum 'pydvl[influence]'"
M = 60

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::Warning"),  # theirs
]


@pytest.fixture(scope="module")
def lib() -> ModuleType:
    spec = importlib.util.spec_from_file_location("with_libraries", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def problem(lib: ModuleType) -> object:
    return lib.problem(200, 4)


@pytest.fixture(scope="module")
def sampler(lib: ModuleType, problem: object) -> fi.SubsetSampler:
    return lib.samplers(problem, M, seed=0)["curvature"]


def test_a_plain_loader_gives_the_weighted_products(
    lib: ModuleType, problem: object, sampler: fi.SubsetSampler
) -> None:
    x, y = problem.train.tensors
    rows = sampler.indices
    H = fi.Hessian(problem.model, F.cross_entropy, (x[rows], y[rows]), weights=sampler.weights)
    x, y = problem.test.tensors
    g = torch.stack(
        [fi.mean_gradient(problem.model, F.cross_entropy, (x[i, None], y[i, None])) for i in (0, 3)]
    )
    products = lib.with_loader(problem, sampler, batch_size=25)  # a short last batch
    torch.testing.assert_close(products[[0, 3]], H @ g)


def test_curvature_rows_agree_better_than_random_ones_and_not_without_weights(
    lib: ModuleType, problem: object
) -> None:
    got = lib.compare(problem, lib.with_loader, M, seeds=3)
    assert got["curvature"].error < 0.8 * got["random"].error
    assert got["curvature, weights forgotten"].error > 3 * got["curvature"].error


@pytest.mark.parametrize("arnoldi", [0, 20])
def test_captum(lib: ModuleType, problem: object, sampler: fi.SubsetSampler, arnoldi: int) -> None:
    pytest.importorskip("captum", reason=NEEDS)
    got = lib.with_captum(problem, sampler, arnoldi=arnoldi)
    found = lib.agreement(got, lib.exact_scores(problem, sampler))
    if arnoldi:  # the rest of the spectrum is dropped, not damped
        assert found.correlation > 0.9
    else:
        assert found.error < 1e-4  # captum adds its regulariser in float32


@pytest.mark.parametrize("batch_size", [None, 20])
def test_pydvl(
    lib: ModuleType, problem: object, sampler: fi.SubsetSampler, batch_size: int | None
) -> None:
    pytest.importorskip("pydvl", reason=NEEDS)
    pytest.importorskip("distributed", reason=NEEDS)
    got = lib.with_pydvl(problem, sampler, batch_size=batch_size)
    assert lib.agreement(got, lib.exact_scores(problem, sampler)).error < 1e-6


def test_pydvl_refuses_a_batch_size_that_leaves_a_short_batch(
    lib: ModuleType, problem: object, sampler: fi.SubsetSampler
) -> None:
    pytest.importorskip("pydvl", reason=NEEDS)
    pytest.importorskip("distributed", reason=NEEDS)
    with pytest.raises(ValueError, match="batch_size = 50 does not divide the 60 rows"):
        lib.with_pydvl(problem, sampler, batch_size=50)
