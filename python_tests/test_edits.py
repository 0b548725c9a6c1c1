"""remove_rows and correct_labels against retraining."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, TensorDataset

import fastif_ext as fi
from fastif_ext.training import train_lbfgs

pytestmark = pytest.mark.usefixtures("one_thread")

DOUBLE = torch.float64
L2 = 1e-2
N = 240


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def fitted(x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(5, 3, dtype=DOUBLE)
    train_lbfgs(model, x, y, l2=L2)
    return model


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    y = torch.arange(N) % 3
    centers = 1.5 * torch.randn(3, 5, generator=g, dtype=DOUBLE)
    return centers[y] + torch.randn(N, 5, generator=g, dtype=DOUBLE), y


@pytest.fixture(scope="module")
def model(data: tuple[Tensor, Tensor]) -> nn.Module:
    return fitted(*data)


ROWS = torch.arange(0, 60, 2)


def all_rows(extracted: fi.Extracted, step: int) -> fi.SubsetSampler:
    return fi.AllRows(len(extracted.logits))


class TestRemoveRows:
    @pytest.mark.parametrize("steps", [1, 2, 4])
    def test_comes_to_retraining(
        self, model: nn.Module, data: tuple[Tensor, Tensor], steps: int
    ) -> None:
        """Damping = weight decay: each Newton step squares the error; one step is influence."""
        x, y = data
        kept = torch.ones(N, dtype=torch.bool)
        kept[ROWS] = False
        change = flat(fitted(x[kept], y[kept])) - flat(model)
        report = fi.remove_rows(
            model, TensorDataset(x, y), ROWS, steps=steps, sampler=all_rows, solver="cg",
            damping=L2, tol=1e-10,
        )  # fmt: skip
        error = float((report.delta - change).norm() / change.norm())
        assert error < {1: 0.1, 2: 1e-3, 4: 1e-4}[steps]
        assert len(report.norms) == steps
        assert report.damping == L2
        assert report.converged

    def test_first_step_is_the_influence_function(
        self, model: nn.Module, data: tuple[Tensor, Tensor]
    ) -> None:
        x, y = data
        kept = torch.ones(N, dtype=torch.bool)
        kept[ROWS] = False
        report = fi.remove_rows(
            model, TensorDataset(x, y), ROWS, sampler=all_rows, solver="exact", damping=0.1
        )
        want, common = (
            fi.influence(
                model, cross_entropy, (x[rows], y[rows]), (x[kept], y[kept]), solver="exact",
                damping=0.1,
            )
            for rows in (ROWS, torch.arange(N))
        )  # fmt: skip
        assert want.step == len(ROWS) / (N - len(ROWS))
        delta = (want.delta - common.delta) * want.step
        torch.testing.assert_close(report.delta, delta, rtol=1e-5, atol=1e-8)

    def test_report(self, model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
        x, y = data
        train, test = TensorDataset(x, y), TensorDataset(x[:90] + 0.1, y[:90])
        repeated = torch.cat([ROWS, ROWS])
        report = fi.remove_rows(model, train, repeated, test=test, damping=L2)
        once = fi.remove_rows(model, train, ROWS, damping=L2)
        assert torch.equal(report.delta, once.delta)
        assert once.test_after is None
        with torch.no_grad():
            logits = report.model(x[ROWS])
        assert report.edited_after.loss == pytest.approx(float(cross_entropy(logits, y[ROWS])))
        hit = (logits.argmax(1) == y[ROWS]).double().mean()
        assert report.edited_after.accuracy == pytest.approx(float(hit))
        assert report.edited_after.loss > report.edited_before.loss
        kept = torch.ones(N, dtype=torch.bool)
        kept[ROWS] = False
        assert report.kept_before.loss == pytest.approx(
            float(cross_entropy(model(x[kept]).detach(), y[kept]))
        )
        assert report.test_after is not None
        assert report.delta_norm == pytest.approx(float(report.delta.norm()))
        assert "test set" in report.summary()
        facts = json.loads(json.dumps(report.to_dict()))
        assert facts["test_after"]["accuracy"] == report.test_after.accuracy
        assert facts["norms"] == report.norms

    def test_a_curvature_subset_comes_near(
        self, model: nn.Module, data: tuple[Tensor, Tensor]
    ) -> None:
        x, y = data
        train = TensorDataset(x, y)
        exact = fi.remove_rows(model, train, ROWS, sampler=all_rows, damping=0.05, tol=1e-6)
        near = fi.remove_rows(model, train, ROWS, samples=120, damping=0.05, tol=1e-6)
        assert (near.delta - exact.delta).norm() < 0.3 * exact.delta.norm()

    def test_selected_parameters(self, model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
        report = fi.remove_rows(
            model, TensorDataset(*data), ROWS, params=["bias"], steps=2, damping=L2
        )
        assert torch.equal(report.model.weight, model.weight)
        assert not torch.equal(report.model.bias, model.bias)


class Rows(Dataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], int(self.y[i])


class TestCorrectLabels:
    @pytest.fixture
    @staticmethod
    def wrong(data: tuple[Tensor, Tensor]) -> tuple[TensorDataset, nn.Module]:
        x, y = data
        flipped = y.clone()
        flipped[ROWS] = (y[ROWS] + 1) % 3
        return TensorDataset(x, flipped), fitted(x, flipped)

    @pytest.mark.parametrize("steps", [1, 8])
    def test_comes_to_retraining(
        self,
        data: tuple[Tensor, Tensor],
        model: nn.Module,
        wrong: tuple[TensorDataset, nn.Module],
        steps: int,
    ) -> None:
        train, mistaken = wrong
        change = flat(model) - flat(mistaken)
        report = fi.correct_labels(
            mistaken, train, ROWS, data[1][ROWS], steps=steps, sampler=all_rows, solver="cg",
            damping=L2, tol=1e-10,
        )  # fmt: skip
        error = float((report.delta - change).norm() / change.norm())
        assert error < {1: 0.7, 8: 1e-4}[steps]
        assert report.edited_after.accuracy > report.edited_before.accuracy
        assert torch.equal(train.tensors[1][ROWS], (data[1][ROWS] + 1) % 3)  # left as it was

    def test_order_and_kind_of_data(
        self, data: tuple[Tensor, Tensor], wrong: tuple[TensorDataset, nn.Module]
    ) -> None:
        train, mistaken = wrong
        labels = data[1][ROWS]
        a = fi.correct_labels(mistaken, train, ROWS, labels, damping=L2, steps=2)
        shuffled = torch.randperm(len(ROWS))
        b = fi.correct_labels(
            mistaken, Rows(*train.tensors), ROWS[shuffled], labels[shuffled], damping=L2, steps=2
        )
        torch.testing.assert_close(a.delta, b.delta)

    def test_bad_input(self, data: tuple[Tensor, Tensor], model: nn.Module) -> None:
        train, correct = TensorDataset(*data), fi.correct_labels
        with pytest.raises(ValueError, match="rows has repeats"):
            correct(model, train, torch.tensor([1, 1]), torch.tensor([0, 0]))
        with pytest.raises(ValueError, match="one for each of the 2 rows"):
            correct(model, train, torch.tensor([1, 2]), torch.tensor([0]))
        with pytest.raises(ValueError, match="between 0 and 2, the model's classes; got 1 to 3"):
            correct(model, train, torch.tensor([1, 2]), torch.tensor([3, 1]))


def test_nothing_is_changed(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.train()
    train = TensorDataset(*data)
    fi.remove_rows(model, train, ROWS, damping=L2)
    fi.correct_labels(model, train, ROWS, data[1][ROWS], damping=L2)
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())


def test_bad_input(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    train = TensorDataset(*data)
    with pytest.raises(ValueError, match="rows are all 240 rows of train"):
        fi.remove_rows(model, train, torch.arange(N))
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 240\)"):
        fi.remove_rows(model, train, torch.tensor([240]))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        fi.remove_rows(model, train, ROWS, steps=0)
    with pytest.raises(ValueError, match="solver must be one of"):
        fi.remove_rows(model, train, ROWS, solver="lu")
