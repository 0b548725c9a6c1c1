"""Recorded products: with a stand-in for the CUDA graph everywhere, with the real one on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastif_ext as fi
from fastif_ext import graphs
from fastif_ext.curvature import NormalEquations
from fastif_ext.data import device_of
from fastif_ext.graphs import SHAPES, WARM, RecordedProducts, recorded
from fastif_ext.parameters import Selection

pytestmark = pytest.mark.usefixtures("one_thread")


class StandIn:
    """What a CUDA graph does, on the CPU: the same work again, from and into the same memory."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.inside = False  # what is made outside cannot be recorded, as on a GPU
        self.failure, self.recordings, self.played = failure, 0, 0

    def run(self, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        self.inside = True
        try:
            return work()
        finally:
            self.inside = False

    def record(self, work: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        if self.failure is not None:
            raise self.failure
        results = self.run(work)
        self.recordings += 1

        def play() -> None:
            self.played += 1
            for place, value in zip(results, self.run(work), strict=True):
                place.copy_(value)

        return results, play


class Kept:
    """A matrix that keeps something it made with its first product, as Hessian keeps a graph."""

    recordable = True

    def __init__(self, A: Tensor, recorder: StandIn) -> None:
        self.A, self.recorder, self.made = A, recorder, None
        self.dim, self.device, self.dtype = len(A), A.device, A.dtype

    def renew(self) -> None:
        self.made = None

    def products(self, v: Tensor) -> list[Tensor]:
        if v.shape[1] != self.dim or v.dtype != self.dtype:
            raise ValueError("v does not fit")
        if self.made is None:
            self.made = self.recorder.inside
        if self.recorder.inside and not self.made:
            raise RuntimeError("made on the default stream")
        return [*(v @ self.A).split(2, dim=1)]

    def __matmul__(self, v: Tensor) -> Tensor:
        return torch.cat(self.products(v if v.dim() == 2 else v[None]), 1).view(v.shape)


def matrix(p: int = 6) -> Tensor:
    A = torch.randn(p, p, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return A @ A.T + torch.eye(p)


def test_every_product_is_right_whether_made_or_played() -> None:
    recorder = StandIn()
    H = Kept(matrix(), recorder)
    H @ torch.ones(6, dtype=torch.float64)  # made outside: it has to be made again
    played = RecordedProducts(H, recorder)
    for k in range(2 * WARM + 4):
        for R in (1, 3):
            v = torch.randn(R, 6, dtype=torch.float64)
            torch.testing.assert_close(played @ v, v @ H.A)
            torch.testing.assert_close(torch.cat(played.products(v), 1), v @ H.A)
        assert recorder.recordings == (2 if 2 * (k + 1) > WARM else 0)
    one = torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(played @ one, one @ H.A)
    assert recorder.played > 8


def test_a_result_is_the_callers_own_and_parts_are_not() -> None:
    recorder = StandIn()
    played = RecordedProducts(Kept(matrix(), recorder), recorder)
    v = torch.ones(1, 6, dtype=torch.float64)
    for _ in range(WARM + 1):
        first, parts = played @ v, played.products(v)
    kept = first.clone()
    played @ (2 * v)
    assert torch.equal(first, kept)
    torch.testing.assert_close(torch.cat(parts, 1), 2 * kept)


def test_what_does_not_fit_is_refused_by_the_operator() -> None:
    recorder = StandIn()
    played = RecordedProducts(Kept(matrix(), recorder), recorder)
    for _ in range(WARM + 2):
        played @ torch.ones(2, 6, dtype=torch.float64)
    assert recorder.recordings == 1
    for bad in (torch.ones(2, 6), torch.ones(2, 1, dtype=torch.float64)):
        with pytest.raises(ValueError, match="v does not fit"):
            played @ bad
    assert (played @ torch.ones(0, 6, dtype=torch.float64)).shape == (0, 6)


def test_only_so_many_shapes_are_kept() -> None:
    recorder = StandIn()
    played = RecordedProducts(Kept(matrix(), recorder), recorder)
    for R in range(1, SHAPES + 4):
        v = torch.randn(R, 6, dtype=torch.float64)
        for _ in range(WARM + 2):
            torch.testing.assert_close(played @ v, v @ matrix())
    assert recorder.recordings == SHAPES


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("operation not permitted when stream is capturing"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_failure_is_logged_and_made_up_for(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = StandIn(failure)
    H = Kept(matrix(), recorder)
    played = RecordedProducts(H, recorder)
    with caplog.at_level(logging.WARNING, "fastif_ext"):
        for _ in range(WARM + 5):
            v = torch.randn(2, 6, dtype=torch.float64)
            torch.testing.assert_close(played @ v, v @ H.A)
    assert len(caplog.records) == 1
    assert str(failure) in caplog.text
    assert "Kept" in caplog.text
    assert H.made is False  # made anew, where the caller's products are made


def test_insisting_raises() -> None:
    recorder = StandIn(RuntimeError("stream is capturing"))
    played = RecordedProducts(Kept(matrix(), recorder), recorder, strict=True)
    v = torch.ones(1, 6, dtype=torch.float64)
    for _ in range(WARM):
        played @ v
    with pytest.raises(RuntimeError, match="cuda_graph=True.*Kept.*stream is capturing"):
        played @ v


def test_the_operator_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = StandIn()
    monkeypatch.setattr(graphs, "recorder_of", lambda device: recorder)
    H = Kept(matrix(), recorder)
    with recorded(H, "auto", torch.device("cpu")) as A:
        assert isinstance(A, RecordedProducts)
        assert (A.dim, A.dtype) == (6, torch.float64)
        A @ torch.ones(1, 6, dtype=torch.float64)
        assert H.made is True
        with recorded(A, "auto", torch.device("cpu")) as same:
            assert same is A
        assert H.made is True
    assert H.made is None
    with recorded(H, False, torch.device("cpu")) as plain:
        assert plain is H
    with recorded(matrix(), "auto", torch.device("cpu")) as plain:
        assert isinstance(plain, Tensor)


def problem() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, (torch.randn(40, 5, dtype=torch.float64), torch.arange(40) % 3)


OPERATORS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "hessian": lambda model, data: fi.Hessian(model, F.cross_entropy, data),
    "gauss-newton": lambda model, data: fi.GaussNewton(model, data),
    "normal": lambda model, data: NormalEquations(
        fi.Hessian(model, F.cross_entropy, data),
        Selection(model, torch.arange(57) % 2 == 0),
        damping=0.2,
    ),
    "linear-softmax": lambda model, data: fi.LinearSoftmaxHessian(
        data[0].to(device_of(model)), model(data[0].to(device_of(model))).detach()
    ),
}


@pytest.mark.parametrize("solve", [fi.lissa, fi.cg])
@pytest.mark.parametrize("name", OPERATORS)
def test_solvers_with_recorded_products(
    name: str, solve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    H = OPERATORS[name](*problem())
    b = torch.randn(2, H.dim, dtype=torch.float64)
    want = solve(H, b, damping=0.5, tol=1e-8, max_iter=5000)
    recorder = StandIn()
    monkeypatch.setattr(graphs, "recorder_of", lambda device: recorder)
    got = solve(H, b, damping=0.5, tol=1e-8, max_iter=5000, cuda_graph=True)
    assert recorder.played > 0
    assert got.iterations == want.iterations
    torch.testing.assert_close(got.x, want.x)
    torch.testing.assert_close(H @ b, H @ b.clone())


def test_scores_share_one_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = problem()
    want = fi.influence_scores(model, F.cross_entropy, data, data, damping=0.2, test_chunk=10)
    mine = fi.self_influence(model, F.cross_entropy, data, damping=0.2, chunk=10)
    made: list[StandIn] = []

    def make(device: torch.device) -> StandIn:
        made.append(StandIn())
        return made[-1]

    monkeypatch.setattr(graphs, "recorder_of", make)
    options: dict[str, Any] = {"damping": 0.2, "cuda_graph": True}
    got = fi.influence_scores(model, F.cross_entropy, data, data, test_chunk=10, **options)
    own = fi.self_influence(model, F.cross_entropy, data, chunk=10, **options)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(own, mine)
    assert [recorder.recordings for recorder in made] == [1, 1]  # one shape, four chunks each


def test_what_cannot_be_recorded_says_so() -> None:
    model, data = problem()
    chunked = fi.Hessian(model, F.cross_entropy, data, graph_memory=1 << 10)
    assert not chunked.recordable
    assert fi.Hessian(model, F.cross_entropy, data).recordable
    with pytest.raises(ValueError, match="a Hessian on cpu cannot be recorded.*CUDA device"):
        fi.cg(chunked, torch.ones(57, dtype=torch.float64), damping=0.1, cuda_graph=True)
    assert not NormalEquations(matrix(57), Selection(model), damping=0.1).recordable


@pytest.mark.gpu
@pytest.mark.parametrize("solve", [fi.lissa, fi.cg])
@pytest.mark.parametrize("name", OPERATORS)
def test_real_graphs(name: str, solve: Any, gpu: str) -> None:
    model, data = problem()
    H = OPERATORS[name](model.to(gpu), data)
    b = torch.randn(2, H.dim, dtype=torch.float64).to(gpu)
    options: dict[str, Any] = {"damping": 0.5, "tol": 1e-8, "max_iter": 5000}
    want = solve(H, b, cuda_graph=False, **options)
    product = H @ b
    got = solve(H, b, cuda_graph=True, **options)  # raises where recording fails
    assert got.iterations == want.iterations
    torch.testing.assert_close(got.x, want.x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(H @ b, product)  # and the operator is usable afterwards


@pytest.mark.gpu
def test_a_real_graph_that_cannot_be_recorded(gpu: str, caplog: pytest.LogCaptureFixture) -> None:
    """Forward mode runs the model in every product, and this model waits for the device."""

    class Waits(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(x.new_ones(1).sum())

    model = nn.Sequential(nn.Linear(5, 4), Waits(4, 3)).double().to(gpu)
    data = torch.randn(20, 5, dtype=torch.float64), torch.arange(20) % 3
    G = fi.GaussNewton(model, data)
    b = torch.randn(G.dim, dtype=torch.float64, device=gpu)
    want = fi.cg(G, b, damping=0.1, cuda_graph=False)
    with caplog.at_level(logging.WARNING, "fastif_ext"):
        got = fi.cg(G, b, damping=0.1)
    assert "not recorded as a CUDA graph" in caplog.text
    torch.testing.assert_close(got.x, want.x, rtol=1e-6, atol=1e-8)
    with pytest.raises(RuntimeError, match="cuda_graph=True"):
        fi.cg(G, b, damping=0.1, cuda_graph=True)


@pytest.mark.gpu
def test_a_real_recording_gives_its_memory_back(gpu: str) -> None:
    model, data = problem()
    H = fi.Hessian(model.to(gpu), F.cross_entropy, data)
    b = torch.randn(H.dim, dtype=torch.float64, device=gpu)
    used = []
    for _ in range(4):
        fi.cg(H, b, damping=0.5, cuda_graph=True)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] == used[1]
