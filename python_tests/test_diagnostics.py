"""Measures by hand, and every signature of failure shown to fire and to stay quiet."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import fastif_ext as fi
from fastif_ext.training import train_lbfgs

pytestmark = pytest.mark.usefixtures("one_thread")

DOUBLE = torch.float64


class TestHvpError:
    def test_by_hand(self) -> None:
        H = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=DOUBLE))
        got = fi.hvp_error(0.75 * H, H)
        assert got == pytest.approx((0.25, 0.25, 0.25))
        assert fi.hvp_error(H, H).mean == 0
        spread = fi.hvp_error(torch.eye(3, dtype=DOUBLE), H, probes=50)
        assert spread.low < spread.mean < spread.high

    def test_more_rows_are_better(self) -> None:
        torch.manual_seed(0)
        model, x = nn.Linear(4, 3), torch.randn(400, 4)
        data = x, torch.randint(3, (400,))
        full = fi.Hessian(model, cross_entropy, data)
        errors = [
            fi.hvp_error(fi.Hessian(model, cross_entropy, (x[:m], data[1][:m])), full).mean
            for m in (20, 80, 320, 400)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-6
        again = fi.hvp_error(fi.Hessian(model, cross_entropy, (x[:20], data[1][:20])), full)
        assert again.mean == errors[0]

    def test_bad_input(self) -> None:
        H = torch.eye(3)
        with pytest.raises(ValueError, match="H_subset has 2 parameters, H_full 3"):
            fi.hvp_error(torch.eye(2), H)
        with pytest.raises(ValueError, match="probes must be at least 1"):
            fi.hvp_error(H, H, probes=0)
        with pytest.raises(ValueError, match="H_full v is 0"):
            fi.hvp_error(H, 0 * H)


class TestCoverage:
    def test_by_hand(self) -> None:
        """Points 0..9 on a line; the subset {2, 7} against a brute-force random mean."""
        x = torch.arange(10.0)[:, None]
        rows = torch.tensor([2, 7])
        draws, g = [], torch.Generator().manual_seed(0)
        for _ in range(5):
            chosen = torch.randperm(10, generator=g)[:2]
            draws.append(torch.cdist(x, x[chosen]).square().min(1).values)
        own = torch.cdist(x, x[rows]).square().min(1).values
        mean = sum(float(d.mean()) for d in draws) / 5
        worst = sum(float(d.max()) for d in draws) / 5
        got = fi.coverage(x, rows, labels=torch.arange(10) // 5)
        assert got.distance == pytest.approx(float(own.mean()) / mean, rel=1e-5)
        assert got.farthest == pytest.approx(float(own.max()) / worst, rel=1e-5)
        assert got.classes == 1
        assert fi.coverage(x, rows[:1], labels=torch.arange(10) // 5).classes == 0.5
        assert fi.coverage(x, torch.arange(10)).distance == 0
        assert fi.coverage(x, rows).classes is None

    def test_scale_does_not_matter(self) -> None:
        torch.manual_seed(0)
        x, rows = torch.randn(100, 3), torch.arange(10)
        a, b = fi.coverage(x, rows), fi.coverage(1000 * x, rows)
        assert a.distance == pytest.approx(b.distance, rel=1e-4)

    def test_bad_input(self) -> None:
        x = torch.randn(5, 2)
        with pytest.raises(ValueError, match=r"indices must lie in \[0, 5\), got 5 to 5"):
            fi.coverage(x, torch.tensor([5]))
        with pytest.raises(ValueError, match="non-empty int64"):
            fi.coverage(x, torch.tensor([1.0]))
        with pytest.raises(ValueError, match=r"features must be a tensor \[n, d\]"):
            fi.coverage(x[0], torch.tensor([1]))
        with pytest.raises(ValueError, match="draws must be at least 1"):
            fi.coverage(x, torch.tensor([1]), draws=0)


class TestCalibration:
    def test_by_hand(self) -> None:
        p = torch.tensor([[0.5, 0.5], [0.8, 0.2], [0.1, 0.9]], dtype=DOUBLE)
        got = fi.calibration(p.log(), torch.tensor([0, 1, 1]))
        torch.testing.assert_close(got.ratios, torch.tensor([1.4, 1.6 / 2], dtype=DOUBLE))
        assert got.worst == pytest.approx(0.4)
        chance = p[:, 0] / 1.4 + 2 * p[:, 1] / 1.6
        assert got.marginal == pytest.approx((float(chance.min()), float(chance.max())))
        # confidences .5 right, .8 wrong, .9 right, each in a bin of its own
        assert got.expected_error == pytest.approx((0.5 + 0.8 + 0.1) / 3)

    @given(st.integers(0, 2**31))
    def test_chances_average_to_one(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        logits, labels = torch.randn(30, 4, generator=g), torch.randint(4, (30,), generator=g)
        low, high = fi.calibration(logits, labels).marginal
        assert low <= 1 + 1e-9
        assert high >= 1 - 1e-9

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="NaN"):
            fi.calibration(torch.tensor([[math.nan, 0.0]]), torch.tensor([0]))
        with pytest.raises(ValueError, match="labels must be between 0 and 1"):
            fi.calibration(torch.zeros(1, 2), torch.tensor([2]))
        with pytest.raises(ValueError, match="no rows"):
            fi.calibration(torch.zeros(0, 2), torch.zeros(0).long())


class TestEffectiveSampleSize:
    @given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
    def test_between_one_and_m(self, weights: list[float]) -> None:
        got = fi.effective_sample_size(torch.tensor(weights))
        assert 1 - 1e-6 <= got <= len(weights) + 1e-6

    def test_by_hand(self) -> None:
        assert fi.effective_sample_size(torch.tensor([3.0, 1.0])) == pytest.approx(1.6)
        assert fi.effective_sample_size(torch.full((7,), 0.2)) == pytest.approx(7)

    @pytest.mark.parametrize("weights", [[], [-1.0, 2.0], [0.0, 0.0], [math.inf]])
    def test_bad_input(self, weights: list[float]) -> None:
        with pytest.raises(ValueError, match="weights must be"):
            fi.effective_sample_size(torch.tensor(weights))


N = 300
REMOVED = torch.arange(0, N, 3)


@pytest.fixture(scope="module")
def healthy() -> tuple[nn.Module, TensorDataset]:
    """Softmax regression at its minimum."""
    g = torch.Generator().manual_seed(2)
    y = torch.arange(N) % 3
    centers = 1.2 * torch.randn(3, 4, generator=g, dtype=DOUBLE)
    x = centers[y] + torch.randn(N, 4, generator=g, dtype=DOUBLE)
    torch.manual_seed(0)
    model = nn.Linear(4, 3, dtype=DOUBLE)
    train_lbfgs(model, x, y, l2=1e-3)
    return model, TensorDataset(x, y)


def curvature(m: int) -> Callable[[fi.Extracted, int], fi.SubsetSampler]:
    return lambda got, seed: fi.CurvatureSampler(got.logits, m, seed=seed)


NAMES = (
    "estimates differ from seed to seed",
    "self-loss does not rise",
    "LiSSA does not converge",
    "a product does not fit into memory",
    "the premise of logit sampling fails",
    "few rows carry the weight",
)


def findings(
    case: tuple[nn.Module, TensorDataset],
    sampler: Callable[[fi.Extracted, int], fi.SubsetSampler],
    **options: Any,
) -> dict[str, bool]:
    model, data = case
    found = fi.diagnose(model, cross_entropy, data, REMOVED, sampler, **options)
    assert tuple(f.name for f in found.findings) == NAMES
    assert found.healthy == (not any(f.applies for f in found.findings))
    for f in found.findings:
        assert ("!!] " + f.name in found.summary()) == f.applies
        assert (f.remedy in found.summary()) == f.applies
    return {f.name: f.applies for f in found.findings}


class TestDiagnose:
    def test_a_healthy_case(self, healthy: tuple[nn.Module, TensorDataset]) -> None:
        assert not any(findings(healthy, curvature(150)).values())

    def test_seeds_that_differ(self, healthy: tuple[nn.Module, TensorDataset]) -> None:
        got = findings(healthy, lambda data, seed: fi.RandomSampler(N, 3, seed=seed))
        assert got["estimates differ from seed to seed"]

    def test_steps_beyond_the_linear_range(self, healthy: tuple[nn.Module, TensorDataset]) -> None:
        """A loss that saturates just above where the model stands."""
        model, data = healthy

        class Saturated(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 3, dtype=DOUBLE)

            def forward(self, x: Tensor) -> Tensor:
                return 1e-2 * torch.sin(100 * self.layer(x))

        net = Saturated()
        net.layer.load_state_dict(model.state_dict())
        got = findings((net, data), curvature(150), damping=2000.0)
        assert got["self-loss does not rise"]

    def test_indefinite(self, healthy: tuple[nn.Module, TensorDataset]) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        got = findings((net, healthy[1]), curvature(100), damping=1e-4)
        assert got["LiSSA does not converge"]
        assert got["the premise of logit sampling fails"]  # not trained

    def test_memory(self, healthy: tuple[nn.Module, TensorDataset]) -> None:
        got = findings(healthy, curvature(150), available_memory=1000)
        assert got["a product does not fit into memory"]

    def test_weights(self, healthy: tuple[nn.Module, TensorDataset]) -> None:
        def lopsided(data: fi.Extracted, seed: int) -> fi.SubsetSampler:
            weights = torch.full((100,), 1e-4)
            weights[:5] = 0.2
            return fi.SubsetSampler(N, torch.arange(100), weights)

        assert findings(healthy, lopsided)["few rows carry the weight"]

    def test_bad_input(self, healthy: tuple[nn.Module, TensorDataset]) -> None:
        model, data = healthy
        with pytest.raises(ValueError, match="seeds must be at least 2, got 1"):
            fi.diagnose(model, cross_entropy, data, REMOVED, curvature(50), seeds=1)
        unlabelled = TensorDataset(data.tensors[0])
        with pytest.raises(ValueError, match="no labels"):
            fi.diagnose(model, cross_entropy, unlabelled, REMOVED, curvature(50))
