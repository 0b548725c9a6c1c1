"""Class removal: metrics by hand, both protocols, and what must stay as it was."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import fastif_ext as fi
from fastif_ext.removal import Guard, Start, shortest_step
from fastif_ext.training import train_lbfgs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def blobs() -> tuple[TensorDataset, TensorDataset]:
    """Three overlapping classes in 5 dimensions."""
    g = torch.Generator().manual_seed(0)
    centers = 2.5 * torch.randn(3, 5, generator=g, dtype=torch.float64)

    def draw(n: int) -> TensorDataset:
        y = torch.arange(n) % 3
        return TensorDataset(centers[y] + torch.randn(n, 5, generator=g, dtype=torch.float64), y)

    return draw(300), draw(150)


@pytest.fixture(scope="module")
def model(blobs: tuple[TensorDataset, TensorDataset]) -> nn.Module:
    """Multinomial logistic regression with L2 1e-2, to its minimum."""
    net = nn.Linear(5, 3, dtype=torch.float64)
    with torch.no_grad():
        net.weight.zero_(), net.bias.zero_()
    x, y = blobs[0].tensors
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss = loss + 0.005 * sum(p.square().sum() for p in net.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    net.zero_grad()
    return net


class TestMetrics:
    def test_by_hand(self) -> None:
        """Class 1: one of two rows right; the others: three of four."""
        logits = torch.eye(3)[[1, 0, 0, 0, 2, 1]] * 2
        data = TensorDataset(logits, torch.tensor([1, 1, 0, 0, 2, 2]))
        got = fi.class_metrics(nn.Identity(), data, 1)
        assert got.self_accuracy == 0.5
        assert got.remaining_accuracy == 0.75
        assert got.f1 == pytest.approx(2 * 0.5 * 0.75 / 1.25)
        norm = torch.log(torch.exp(torch.tensor(2.0)) + 2)
        assert got.self_loss == pytest.approx(float((norm - 2 + norm) / 2))

    @given(st.floats(0, 1), st.floats(0, 1))
    def test_f1_is_the_harmonic_mean(self, s: float, t: float) -> None:
        f1 = fi.f1_score(s, t)
        assert min(1 - s, t) - 1e-12 <= f1 <= max(1 - s, t) + 1e-12
        if 1 - s > 1e-300 and t > 1e-300:
            assert f1 == pytest.approx(2 / (1 / (1 - s) + 1 / t))

    def test_bad_input(self) -> None:
        data = TensorDataset(torch.eye(3), torch.arange(3))
        with pytest.raises(ValueError, match=r"no row of class 7; its labels are \[0, 1, 2\]"):
            fi.class_metrics(nn.Identity(), data, 7)
        with pytest.raises(ValueError, match="self_accuracy must be between 0 and 1, got 1.5"):
            fi.f1_score(1.5, 0.5)


class TestDefaultProtocol:
    def test_forgets_the_class_and_keeps_the_others(
        self, model: nn.Module, blobs: tuple[TensorDataset, TensorDataset]
    ) -> None:
        train, test = blobs
        report = fi.remove_class(model, train, 1, test=test, damping=0.01)
        assert report.target_reached
        assert report.before.self_accuracy > 0.9
        assert report.self_accuracy < 0.05
        assert report.remaining_accuracy > report.before.remaining_accuracy - 0.03
        assert report.self_loss > 2 > report.before.self_loss
        assert report.f1 == fi.class_metrics(report.model, test, 1).f1
        assert report.theory_step == pytest.approx(1 / 2)  # n_c / (n - n_c)

    def test_step_is_the_shortest_that_reaches_the_target(
        self, model: nn.Module, blobs: tuple[TensorDataset, TensorDataset]
    ) -> None:
        train = blobs[0]
        report = fi.remove_class(model, train, 1, linearisations=1, damping=0.01, target=0.05)
        own = fi.data.take(train, (train.tensors[1] == 1).nonzero().flatten())

        def self_accuracy(step: float) -> float:
            moved = fi.apply_update(model, report.influence.delta, step)
            return float((moved(own.tensors[0]).argmax(1) == 1).double().mean())

        assert self_accuracy(report.step) < 0.05
        assert self_accuracy(0.97 * report.step) >= 0.05
        assert all(record.f1 is None for record in report.history)
        assert report.delta_norm == pytest.approx(
            report.step * float(report.influence.delta.norm())
        )

    def test_a_class_that_is_forgotten_already_takes_no_step(
        self, model: nn.Module, blobs: tuple[TensorDataset, TensorDataset]
    ) -> None:
        first = fi.remove_class(model, blobs[0], 1, damping=0.01)
        again = fi.remove_class(first.model, blobs[0], 1, damping=0.5, solver="cg")
        assert again.step == 0
        assert again.steps == 1
        assert again.target_reached
        torch.testing.assert_close(again.model.weight, first.model.weight)

    def test_everything_is_left_as_it_was(
        self, model: nn.Module, blobs: tuple[TensorDataset, TensorDataset]
    ) -> None:
        state = copy.deepcopy(model.state_dict())
        data = [t.clone() for t in blobs[0].tensors]
        rng = torch.get_rng_state()
        model.train()
        report = fi.remove_class(model, blobs[0], 0, damping=0.01)
        assert model.training
        assert report.model.training
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(blobs[0].tensors, data, strict=True))
        assert torch.equal(torch.get_rng_state(), rng)

    def test_any_map_style_dataset(
        self, model: nn.Module, blobs: tuple[TensorDataset, TensorDataset]
    ) -> None:
        train = blobs[0]

        class Rows(Dataset[tuple[Tensor, int]]):
            def __len__(self) -> int:
                return len(train)

            def __getitem__(self, i: int) -> tuple[Tensor, int]:
                return train.tensors[0][i], int(train.tensors[1][i])

        sampler = fi.CurvatureSampler(model(train.tensors[0]), 100, seed=1)
        a = fi.remove_class(model, train, 2, sampler=sampler, damping=0.01)
        b = fi.remove_class(model, Rows(), 2, sampler=sampler, damping=0.01)
        assert a.step == b.step
        torch.testing.assert_close(a.delta, b.delta)

    @pytest.mark.parametrize("parts", [2, 4])
    def test_new_directions_on_the_way(
        self, model: nn.Module, blobs: tuple[TensorDataset, TensorDataset], parts: int
    ) -> None:
        """No part is longer than its share of the first estimate."""
        train, test = blobs
        options: dict[str, Any] = {"damping": 0.01, "samples": 60}
        one = fi.remove_class(model, train, 1, linearisations=1, **options)
        report = fi.remove_class(model, train, 1, test=test, linearisations=parts, **options)
        assert report.target_reached
        assert 1 < len(report.directions) <= 2 * parts
        assert report.norms[0] == pytest.approx(one.delta_norm / parts)
        assert max(report.norms) <= report.norms[0] * (1 + 1e-9)
        assert report.delta_norm <= sum(report.norms) + 1e-9
        assert report.f1 > 0.9
        rows = [d.rows for d in report.directions]
        assert not torch.equal(rows[0], rows[1])  # a fresh subset
        first = report.directions[0].delta @ report.directions[1].delta
        assert first < 0.999999 * report.directions[0].delta.norm() * (
            report.directions[1].delta.norm()
        )

    def test_curvature_is_of_the_rows_that_stay(
        self, model: nn.Module, blobs: tuple[TensorDataset, TensorDataset]
    ) -> None:
        train = blobs[0]
        labels = train.tensors[1]
        report = fi.remove_class(model, train, 1, damping=0.01)
        assert all((labels[d.rows] != 1).all() for d in report.directions)
        # of a fixed sampler the rows of the class are left out, and the weights scaled up
        fixed = fi.AllRows(300)
        got = fi.remove_class(
            model, train, 1, sampler=fixed, damping=0.01, linearisations=1, removed_samples=None,
            solver="exact",
        )  # fmt: skip
        kept, own = (fi.data.take(train, r.nonzero().flatten()) for r in (labels != 1, labels == 1))
        want = fi.influence(
            model, nn.functional.cross_entropy, own, kept, damping=0.01, solver="exact"
        )
        torch.testing.assert_close(got.influence.delta, want.delta, rtol=1e-4, atol=1e-6)

    def test_a_callable_chooses_at_every_step(
        self, model: nn.Module, blobs: tuple[TensorDataset, TensorDataset]
    ) -> None:
        seen = []

        def choose(data: fi.Extracted, step: int) -> fi.SubsetSampler:
            seen.append((step, len(data.logits), sorted(set(data.labels.tolist()))))
            return fi.StratifiedSampler(data.labels, 80, seed=step)

        report = fi.remove_class(model, blobs[0], 1, sampler=choose, damping=0.01)
        assert seen == [(k, 200, [0, 2]) for k in range(len(report.directions))]
        with pytest.raises(TypeError, match="must return a sampler with .indices"):
            fi.remove_class(model, blobs[0], 1, sampler=lambda data, step: [1, 2])
        only = fi.SubsetSampler(300, (blobs[0].tensors[1] == 1).nonzero().flatten())
        with pytest.raises(ValueError, match="no row outside the removed ones"):
            fi.remove_class(model, blobs[0], 1, sampler=only)

    def test_a_few_rows_stand_for_the_class(
        self, model: nn.Module, blobs: tuple[TensorDataset, TensorDataset]
    ) -> None:
        whole = fi.remove_class(model, blobs[0], 1, test=blobs[1], damping=0.01)
        few = fi.remove_class(model, blobs[0], 1, test=blobs[1], damping=0.01, removed_samples=20)
        assert few.target_reached
        assert abs(few.f1 - whole.f1) < 0.02
        assert not torch.equal(few.delta, whole.delta)

    @pytest.mark.parametrize(
        "options",
        [{"curvature": "gauss-newton"}, {"curvature": "linear-softmax"}, {"variant": "gif"}],
    )
    def test_other_curvatures_and_variants(
        self,
        model: nn.Module,
        blobs: tuple[TensorDataset, TensorDataset],
        options: dict[str, str],
    ) -> None:
        report = fi.remove_class(model, blobs[0], 1, solver="cg", damping=0.01, **options)
        assert report.target_reached
        assert report.f1 > 0.9

    def test_only_selected_parameters_move(
        self, model: nn.Module, blobs: tuple[TensorDataset, TensorDataset]
    ) -> None:
        report = fi.remove_class(model, blobs[0], 1, params=["weight"], damping=0.01)
        assert torch.equal(report.model.bias, model.bias)
        assert not torch.equal(report.model.weight, model.weight)

    def test_a_direction_that_cannot_work_warns(
        self, blobs: tuple[TensorDataset, TensorDataset]
    ) -> None:
        """A model that always says class 0, whatever its one parameter."""

        class Stuck(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.shift = nn.Parameter(torch.zeros(1, dtype=torch.float64))

            def forward(self, x: Tensor) -> Tensor:
                return torch.cat([self.shift.expand(len(x), 1) ** 2 + 1, 0 * x[:, :2]], 1)

        with pytest.warns(UserWarning, match="on the training rows of class 0 stayed"):
            report = fi.remove_class(Stuck(), blobs[0], 0, damping=0.1, solver="cg")
        assert not report.target_reached
        assert "NOT reached" in report.summary()


@pytest.fixture(scope="module")
def train() -> TensorDataset:
    """As the blobs, wider."""
    g = torch.Generator().manual_seed(0)
    centers = 2.5 * torch.randn(3, 5, generator=g, dtype=torch.float64)
    y = torch.arange(300) % 3
    x = centers[y] + 1.5 * torch.randn(300, 5, generator=g, dtype=torch.float64)
    return TensorDataset(x, y)


@pytest.fixture(scope="module")
def net(train: TensorDataset) -> nn.Module:
    """A tanh MLP, trained with hardly any decay: its curvature is close to singular."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_lbfgs(net, *train.tensors, l2=1e-4)
    return net


class TestShortestStep:
    """A linear model's logits are linear in the step: where to look next is known exactly."""

    @pytest.fixture
    def line(self) -> tuple[nn.Module, Tensor, TensorDataset]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        x = torch.randn(500, 4, dtype=torch.float64)
        own = (model(x).argmax(1) == 1).nonzero().flatten()
        delta = torch.randn(15, dtype=torch.float64)
        delta[13] = -20.0  # the bias of class 1
        return model, delta, TensorDataset(x[own], torch.ones(len(own), dtype=torch.int64))

    def test_few_looks_and_the_same_step_as_by_halving(self, line) -> None:
        model, delta, own = line
        x = own.tensors[0]

        def knows(step: float) -> float:
            return float((fi.apply_update(model, delta, step)(x).argmax(1) == 1).double().mean())

        for first, target in ((1e-3, 0.01), (0.02, 0.3), (1.0, 0.01)):
            step, history, reached = shortest_step(model, delta, own, 1, first=first, target=target)
            assert reached
            assert knows(step) < target <= knows(0.98 * step)
            doublings = max(0.0, math.log2(step / first))
            assert len(history) <= 4 + math.ceil(doublings)
            assert [r.self_accuracy for r in history] == [knows(r.step) for r in history]

    def test_what_is_known_of_the_start_is_not_looked_at_again(self, line) -> None:
        model, delta, own = line
        calls = []
        model.register_forward_hook(lambda *_: calls.append(1))
        plain = shortest_step(model, delta, own, 1, first=0.1)
        looked = len(calls)
        start = Start(model(own.tensors[0]).detach(), None)
        calls.clear()
        assert shortest_step(model, delta, own, 1, first=0.1, start=start) == plain
        assert len(calls) == looked - 1

    def test_the_last_part_may_be_a_little_longer_than_its_share(self, line) -> None:
        model, delta, own = line
        needed, _, _ = shortest_step(model, delta, own, 1, first=0.1)
        step, _, reached = shortest_step(model, delta, own, 1, first=0.1, limit=0.95 * needed)
        assert reached
        assert step == pytest.approx(needed, rel=0.03)
        short = shortest_step(model, delta, own, 1, first=0.1, limit=0.8 * needed)
        assert (short[0], short[2]) == (0.8 * needed, False)


class TestGuard:
    """Where the shortest step that forgets the class is one that forgets everything."""

    OPTIONS: dict[str, Any] = {  # noqa: RUF012
        "curvature": "gauss-newton",
        "solver": "exact",
        "damping": 1e-3,
        "params": ["0.*"],
        "samples": 20,
    }

    def parts(self, train: TensorDataset) -> tuple[Tensor, Any]:
        y = train.tensors[1]
        return (y != 1).nonzero().flatten(), fi.data.take(train, (y == 1).nonzero().flatten())

    def test_no_step_breaks_the_model(self, net: nn.Module, train: TensorDataset) -> None:
        kept, own = self.parts(train)
        with pytest.warns(UserWarning, match=r"stayed at 0\.\d+, target 0.01; the direction"):
            report = fi.remove_class(net, train, 1, linearisations=1, **self.OPTIONS)
        assert not report.target_reached
        assert not report.broken
        assert report.self_accuracy < report.before.self_accuracy
        assert report.kept_after.accuracy >= 0.9 * report.kept_before.accuracy
        x, y = (t[kept] for t in train.tensors)
        assert report.kept_after.accuracy == pytest.approx(
            float((report.model(x).argmax(1) == y).double().mean())
        )
        assert report.to_dict()["kept_after"]["accuracy"] == report.kept_after.accuracy
        # along the same direction the target is only reached where most other rows are wrong, too
        step, history, reached = shortest_step(net, report.influence.delta, own, 1, first=0.5)
        assert reached
        ruined = fi.apply_update(net, report.influence.delta, step)
        assert (ruined(x).argmax(1) == y).double().mean() < 0.5
        assert all(record.kept_accuracy is None for record in history)

    def test_a_new_direction_gets_there(self, net: nn.Module, train: TensorDataset) -> None:
        report = fi.remove_class(net, train, 1, linearisations=2, **self.OPTIONS)
        assert report.target_reached
        assert report.self_accuracy < 0.01
        assert report.kept_after.accuracy > 0.95 * report.kept_before.accuracy
        assert "BROKEN" not in report.summary()

    def test_a_first_step_that_breaks_it_is_shortened(
        self, net: nn.Module, train: TensorDataset
    ) -> None:
        kept, own = self.parts(train)
        guard = Guard(net, train, kept)
        delta = fi.remove_class(net, train, 1, **self.OPTIONS).directions[0].delta
        for options in ({"first": 1e3}, {"first": 0.5, "limit": 1e3}):
            step, history, _ = shortest_step(net, delta, own, 1, guard=guard, **options)
            assert history[1].step == 1e3
            assert (history[1].kept_accuracy or 0) < guard.floor
            assert 0 < step < 1e3
            assert guard.of(fi.apply_update(net, delta, step)).accuracy >= guard.floor

    def test_the_last_part_is_the_one_with_the_best_f1(
        self, net: nn.Module, train: TensorDataset
    ) -> None:
        """On training rows: longer than the shortest only where that does not cost others."""
        kept, own = self.parts(train)
        guard = Guard(net, train, kept)
        delta = fi.remove_class(net, train, 1, solver="exact", damping=0.1).directions[0].delta
        shortest, _, reached = shortest_step(net, delta, own, 1, first=0.5, guard=guard, target=0.1)
        assert reached
        for limit in (1.1 * shortest, 2 * shortest, 8 * shortest):
            step, history, reached = shortest_step(
                net, delta, own, 1, first=0.5, limit=limit, guard=guard, target=0.1
            )
            assert reached
            assert 0.97 * shortest < step <= limit
            values = [
                fi.f1_score(r.self_accuracy, r.kept_accuracy or 0.0)
                for r in history
                if r.self_accuracy < 0.1 and (r.kept_accuracy or 0.0) >= guard.floor
            ]
            edited = fi.apply_update(net, delta, step)
            assert max(values) == pytest.approx(
                fi.f1_score(
                    fi.class_metrics(edited, train, 1).self_accuracy, guard.of(edited).accuracy
                )
            )

    def test_rows_are_spread_over_all_that_stay(self, net: nn.Module) -> None:
        big = TensorDataset(torch.randn(5000, 5, dtype=torch.float64), torch.arange(5000) // 2000)
        kept = torch.arange(1000, 5000)
        guard = Guard(net, big, kept)
        labels = torch.stack([guard.rows[i][1] for i in range(len(guard.rows))])
        assert labels.bincount().tolist() == [250, 500, 250]

    def test_a_broken_model_is_called_so(self, net: nn.Module, train: TensorDataset) -> None:
        """The paper's protocol picks by the test set; let it be one that likes ruin."""
        y = train.tensors[1]
        test = TensorDataset(train.tensors[0], torch.where(y == 1, 1, 2 - y))
        with pytest.warns(UserWarning, match="the edited model is broken: accuracy on training"):
            report = fi.remove_class(
                net, train, 1, test=test, protocol="paper", step_norm=2.0, **self.OPTIONS
            )
        assert report.broken
        assert "BROKEN" in report.summary()


class TestPaperProtocol:
    def test_keeps_the_best_f1_on_the_test_set(
        self, model: nn.Module, blobs: tuple[TensorDataset, TensorDataset]
    ) -> None:
        train, test = blobs
        report = fi.remove_class(
            model, train, 1, test=test, protocol="paper", damping=0.01, step_norm=0.1, max_steps=60
        )
        assert report.steps == 60
        assert report.f1 == max(record.f1 or 0 for record in report.history)
        steps = torch.tensor([r.step for r in report.history], dtype=torch.float64)
        units = steps * report.influence.delta.norm()
        torch.testing.assert_close(units, 0.1 * torch.arange(1, 61, dtype=torch.float64))
        assert "TEST set" in report.summary()

    def test_needs_a_test_set(
        self, model: nn.Module, blobs: tuple[TensorDataset, TensorDataset]
    ) -> None:
        with pytest.raises(ValueError, match="selects on the test set; pass test="):
            fi.remove_class(model, blobs[0], 1, protocol="paper")


def test_bad_input(model: nn.Module, blobs: tuple[TensorDataset, TensorDataset]) -> None:
    train = blobs[0]
    with pytest.raises(ValueError, match="protocol must be 'default' or 'paper', got 'best'"):
        fi.remove_class(model, train, 1, protocol="best")
    with pytest.raises(ValueError, match="class_index = 9 has 0 of 300 training rows"):
        fi.remove_class(model, train, 9)
    with pytest.raises(ValueError, match="target must be between 0 and 1, got 0"):
        fi.remove_class(model, train, 1, target=0)
    with pytest.raises(ValueError, match=r"sampler.indices must lie in \[0, 300\)"):
        fi.remove_class(model, train, 1, sampler=fi.RandomSampler(1000, 50))
    for name in ("linearisations", "samples", "removed_samples"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            fi.remove_class(model, train, 1, **{name: 0})
    with pytest.raises(ValueError, match="has no labels"):
        fi.remove_class(model, TensorDataset(train.tensors[0]), 1)
