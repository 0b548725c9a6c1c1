"""Influence of a group: closed forms, retraining, subsets, and errors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastif_ext as fi

pytestmark = pytest.mark.usefixtures("one_thread")

DOUBLE = torch.float64
N, D = 120, 5
REMOVED = torch.arange(0, N, 8)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def regression() -> tuple[nn.Module, Tensor, Tensor]:
    """Least squares at its minimum."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=g, dtype=DOUBLE)
    y = x @ torch.randn(D, 1, generator=g, dtype=DOUBLE)
    y = y + torch.randn(N, 1, generator=g, dtype=DOUBLE)
    model = nn.Linear(D, 1, bias=False, dtype=DOUBLE)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    return model, x, y


def test_removal_from_least_squares_is_exact_with_the_retain_hessian(
    regression: tuple[nn.Module, Tensor, Tensor],
) -> None:
    """The loss is quadratic: a Newton step on the retained rows is retraining."""
    model, x, y = regression
    keep = torch.ones(N, dtype=torch.bool)
    keep[REMOVED] = False
    retain = SimpleNamespace(
        indices=keep.nonzero().flatten(),
        weights=torch.full((int(keep.sum()),), 1 / int(keep.sum())),
    )
    got = fi.influence(
        model, F.mse_loss, REMOVED, (x, y), sampler=retain, solver="exact", damping=0.0
    )
    step = len(REMOVED) / int(keep.sum())
    moved = fi.apply_update(model, got.delta, step)
    want = torch.linalg.lstsq(x[keep], y[keep]).solution.T
    torch.testing.assert_close(moved.weight.detach(), want, rtol=1e-6, atol=1e-6)


def test_first_order_direction_on_all_rows(regression: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = regression
    got = fi.influence(model, F.mse_loss, REMOVED, (x, y), solver="cg", damping=0.0, tol=1e-10)
    H = 2 * x.T @ x / N
    residual = x[REMOVED] @ model.weight.detach().T - y[REMOVED]
    g = 2 * (x[REMOVED] * residual).mean(0)
    torch.testing.assert_close(got.gradient, g)
    torch.testing.assert_close(got.delta, torch.linalg.solve(H, g))
    assert got.solve.converged


def test_points_the_way_of_retraining_in_logistic_regression() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(300, 4, generator=g, dtype=DOUBLE)
    y = (x @ torch.randn(4, 3, generator=g, dtype=DOUBLE)).argmax(1)
    l2 = 0.05

    def fit(rows: Tensor, share: float) -> nn.Module:
        """Minimum of the sum over rows / 300 + l2/2 |theta|^2: removal keeps the other weights."""
        model = nn.Linear(4, 3, dtype=DOUBLE)
        with torch.no_grad():
            _ = model.weight.zero_(), model.bias.zero_()
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            penalty = sum(p.square().sum() for p in model.parameters())
            loss = share * F.cross_entropy(model(x[rows]), y[rows]) + l2 / 2 * penalty
            loss.backward()
            return loss

        optimizer.step(closure)
        return model

    everything, removed = torch.arange(300), torch.arange(15)
    model, retrained = fit(everything, 1.0), fit(everything[15:], 285 / 300)
    change = flat(retrained) - flat(model)
    got = fi.influence(model, F.cross_entropy, removed, (x, y), damping=l2, tol=1e-8)
    predicted = 15 / 300 * got.delta
    assert float(F.cosine_similarity(predicted, change, dim=0)) > 0.99
    assert 0.8 < float(predicted.norm() / change.norm()) < 1.2


class TestArguments:
    @pytest.fixture(scope="class")
    @staticmethod
    def mlp() -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        return model, torch.randn(N, D, dtype=DOUBLE), torch.randint(3, (N,))

    def test_forms_of_data_and_solvers_agree(self, mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
        model, x, y = mlp
        want = fi.influence(
            model, F.cross_entropy, REMOVED, (x, y), solver="exact", damping=0.3
        ).delta
        gone = x[REMOVED], y[REMOVED]
        for removed in (REMOVED, gone, TensorDataset(*gone), DataLoader(TensorDataset(*gone), 4)):
            for solver in ("lissa", "cg"):
                got = fi.influence(
                    model, F.cross_entropy, removed, TensorDataset(x, y), solver=solver,
                    damping=0.3, tol=1e-9,
                )  # fmt: skip
                torch.testing.assert_close(got.delta, want, rtol=1e-5, atol=1e-7)

    def test_subset_and_parameters(self, mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
        """Dense algebra on the weighted subset, repeated rows and all, for a third of theta."""
        model, x, y = mlp
        rows, weights = torch.tensor([1, 1, 5, 60, 90]), torch.tensor([0.1, 0.3, 0.2, 0.3, 0.1])
        sampler = SimpleNamespace(indices=rows, weights=weights)
        got = fi.influence(
            model, F.cross_entropy, REMOVED, (x, y), sampler=sampler, params=["2.*"],
            damping=0.4, tol=1e-10,
        )  # fmt: skip
        hidden = torch.cat([torch.tanh(model[0](x)), torch.ones(N, 1)], 1).detach()
        p = model(x).softmax(1).detach()
        H = torch.zeros(15, 15, dtype=DOUBLE)
        for i, w in zip(rows, weights.double(), strict=True):
            block = torch.diag(p[i]) - torch.outer(p[i], p[i])
            H += w * torch.kron(block, torch.outer(hidden[i], hidden[i]))
        g = ((p - F.one_hot(y, 3))[REMOVED].T @ hidden[REMOVED] / len(REMOVED)).flatten()
        x_dense = torch.linalg.solve(H + 0.4 * torch.eye(15, dtype=DOUBLE), g).view(3, 5)
        second = got.delta[4 * D + 4 :]
        torch.testing.assert_close(second[:12].view(3, 4), x_dense[:, :4], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(second[12:], x_dense[:, 4], rtol=1e-6, atol=1e-8)
        assert got.delta[: 4 * D + 4].abs().max() == 0
        assert torch.equal(got.rows, rows)

    def test_real_sampler(self, mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
        model, x, y = mlp
        sampler = fi.CurvatureSampler(model(x), N, seed=0)  # all rows: equals no sampler
        a = fi.influence(model, F.cross_entropy, REMOVED, (x, y), sampler=sampler, damping=0.3)
        b = fi.influence(model, F.cross_entropy, REMOVED, (x, y), damping=0.3)
        torch.testing.assert_close(a.delta, b.delta, rtol=1e-2, atol=1e-3)

    def test_bad_input(self, mlp: tuple[nn.Module, Tensor, Tensor]) -> None:
        model, x, y = mlp

        def run(removed: Any = REMOVED, train: Any = (x, y), **options: Any) -> None:
            fi.influence(model, F.cross_entropy, removed, train, **options)

        with pytest.raises(ValueError, match=r"variant must be one of .*, got 'newton'"):
            run(variant="newton")
        with pytest.raises(ValueError, match="solver must be one of .*, got 'lu'"):
            run(solver="lu")
        with pytest.raises(ValueError, match=r"removed must lie in \[0, 120\).* got 5 to 120"):
            run(torch.tensor([5, 120]))
        with pytest.raises(ValueError, match="non-empty int64 tensor of row numbers"):
            run(torch.ones(N, dtype=torch.bool))
        with pytest.raises(TypeError, match="train must be .* a Dataset: rows are chosen"):
            run(train=DataLoader(TensorDataset(x, y)))
        with pytest.raises(TypeError, match=r"must have .indices and .weights.* got a list"):
            run(sampler=[1, 2])
        with pytest.raises(fi.SolverDivergence, match="indefinite"):
            run(damping=0.0, sampler=fi.RandomSampler(N, 5))


class TestApplyUpdate:
    def test_moves_a_copy(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
        before = flat(model).clone()
        moved = fi.apply_update(model, torch.arange(10.0), -2.0)
        torch.testing.assert_close(flat(moved), before - 2 * torch.arange(10.0))
        assert torch.equal(flat(model), before)
        assert moved.training

    def test_frozen_parameters_stay_and_wrong_length_is_refused(self) -> None:
        model = nn.Linear(3, 1)
        model.bias.requires_grad_(False)
        moved = fi.apply_update(model, torch.ones(3))
        assert torch.equal(moved.bias, model.bias)
        with pytest.raises(ValueError, match=r"delta has shape \[4\], the model has 3 trainable"):
            fi.apply_update(model, torch.ones(4))
