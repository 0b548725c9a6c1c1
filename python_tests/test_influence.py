"""Influence of a group of training points: closed forms, retraining, options, errors."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fastif_ext as fi

pytestmark = pytest.mark.usefixtures("one_thread")

N, D = 60, 4
LAMBDA = 0.05


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs[:, 0] - targets).square().mean()


def ridge(rows: Tensor | None = None) -> tuple[nn.Module, Tensor, Tensor]:
    """The minimum of the mean squared loss + LAMBDA/2 |theta|^2 over `rows`, in closed form."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=g, dtype=torch.float64)
    y = x @ torch.arange(1.0, D + 1).double() + torch.randn(N, generator=g, dtype=torch.float64)
    keep = torch.arange(N) if rows is None else rows
    X, n = x[keep], len(keep)
    theta = torch.linalg.solve(
        X.T @ X / n + LAMBDA * torch.eye(D, dtype=X.dtype), X.T @ y[keep] / n
    )
    model = nn.Linear(D, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(theta[None])
    return model, x, y


REMOVED = torch.tensor([3, 7, 8, 20, 41])


class Rows(Dataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i]


@pytest.mark.parametrize("solver", ["lissa", "cg", "exact"])
def test_quadratic_problem_in_closed_form(solver: str) -> None:
    """As stated; with the group's own curvature taken out of H, it is the exact change."""
    model, x, y = ridge()
    result = fi.influence(model, squared, REMOVED, (x, y), solver=solver, damping=LAMBDA, tol=1e-10)
    A = x.T @ x / N + LAMBDA * torch.eye(D, dtype=torch.float64)
    residual = (x @ model.weight[0] - y).detach()
    g = (x[REMOVED] * residual[REMOVED, None]).mean(0)
    torch.testing.assert_close(result.gradient, g)
    torch.testing.assert_close(result.delta, torch.linalg.solve(A, g), rtol=1e-7, atol=1e-9)
    assert result.variant == "if"
    assert result.rows is None
    assert result.solve.converged
    assert result.solve.damping == LAMBDA

    # Exact leave-group-out is one Newton step on the kept points, whose gradient at theta is
    # -n_c / (n - n_c) (g + lambda theta).
    kept = torch.ones(N, dtype=torch.bool)
    kept[REMOVED] = False
    rows = kept.nonzero().flatten()
    sampler = SimpleNamespace(
        indices=rows, weights=torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    )
    sampled = fi.influence(
        model, squared, REMOVED, (x, y), sampler=sampler, solver="exact", damping=LAMBDA
    )
    pull = fi.exact(
        fi.Hessian(model, squared, (x[kept], y[kept])), model.weight[0].detach(), damping=LAMBDA
    ).x
    change = ridge(rows)[0].weight[0] - model.weight[0]
    step = len(REMOVED) / len(rows)
    predicted = step * (sampled.delta + LAMBDA * pull)
    torch.testing.assert_close(predicted, change.detach(), rtol=1e-8, atol=1e-10)


def fit(x: Tensor, y: Tensor) -> nn.Module:
    """Softmax regression at the minimum of mean loss + LAMBDA/2 |theta|^2, by Newton's method."""
    model = nn.Linear(x.shape[1], 3, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    for _ in range(30):
        theta = torch.cat([p.detach().flatten() for p in model.parameters()])
        g = fi.mean_gradient(model, F.cross_entropy, (x, y)) + LAMBDA * theta
        H = fi.Hessian(model, F.cross_entropy, (x, y))
        model = fi.apply_update(model, fi.exact(H, g, damping=LAMBDA).x, -1)
        if g.norm() < 1e-12:
            break
    assert g.norm() < 1e-10
    return model


@pytest.mark.parametrize("group", [1, 10, 40])
def test_points_the_way_that_retraining_goes(group: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(400, 5, dtype=torch.float64)
    y = (x[:, :3] + 0.8 * torch.randn(400, 3)).argmax(1)
    model = fit(x, y)
    removed = (y == 1).nonzero().flatten()[:group]
    kept = torch.ones(400, dtype=torch.bool)
    kept[removed] = False
    retrained = fit(x[kept], y[kept])
    change = torch.cat(
        [(a - b).flatten() for a, b in zip(retrained.parameters(), model.parameters(), strict=True)]
    ).detach()
    # At the minimum the mean gradient is -LAMBDA theta; the regulariser's pull is the same for
    # every point, so that a point's own part of the objective has gradient g + LAMBDA theta.
    got = fi.influence(model, F.cross_entropy, removed, (x, y), damping=LAMBDA, tol=1e-6)
    H = fi.Hessian(model, F.cross_entropy, (x, y))
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    whole = got.delta + fi.exact(H, LAMBDA * theta, damping=LAMBDA).x
    for direction in (got.delta, whole):
        assert F.cosine_similarity(direction, change, dim=0) > 0.95
    # the size, with the theory step n_c/(n - n_c) of the retain form
    size = (whole * group / (400 - group)).norm() / change.norm()
    assert 0.8 < size < 1.2


class TestRemoved:
    @pytest.mark.parametrize("kind", ["rows", "tensors", "TensorDataset", "Dataset", "loader"])
    @pytest.mark.parametrize("train", ["tensors", "TensorDataset", "Dataset"])
    def test_every_way_to_name_the_points(self, kind: str, train: str) -> None:
        model, x, y = ridge()
        data: Any = {"tensors": (x, y), "TensorDataset": TensorDataset(x, y), "Dataset": Rows(x, y)}
        points: Any = {
            "rows": REMOVED,
            "tensors": (x[REMOVED], y[REMOVED]),
            "TensorDataset": TensorDataset(x[REMOVED], y[REMOVED]),
            "Dataset": Rows(x[REMOVED], y[REMOVED]),
            "loader": DataLoader(Rows(x[REMOVED], y[REMOVED]), batch_size=2),
        }
        expected = fi.influence(model, squared, REMOVED, (x, y), damping=0.1, solver="exact")
        got = fi.influence(model, squared, points[kind], data[train], damping=0.1, solver="exact")
        torch.testing.assert_close(got.delta, expected.delta)


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, torch.randn(50, 4, dtype=torch.float64), torch.randint(3, (50,))


def test_parameters_outside_the_selection_do_not_move() -> None:
    model, x, y = mlp()
    rows = torch.arange(5)
    got = fi.influence(model, F.cross_entropy, rows, (x, y), params=["2.*"], damping=0.1, tol=1e-8)
    assert got.delta.shape == (30 + 21,)
    assert got.gradient.shape == (21,)
    assert not got.delta[:30].any()
    H = fi.Hessian(model, F.cross_entropy, (x, y), params=model[2])
    expected = fi.exact(H, got.gradient, damping=0.1).x
    torch.testing.assert_close(got.delta[30:], expected, rtol=1e-6, atol=1e-8)


def test_sampler_gives_rows_and_weights() -> None:
    model, x, y = mlp()
    sampler = SimpleNamespace(
        indices=torch.tensor([0, 3, 3, 3, 49, 17, 17, 20]),
        weights=torch.tensor([0.1, 0.3, 0.05, 0.2, 0.4, 0.1, 0.2, 0.02]),
    )
    got = fi.influence(
        model, F.cross_entropy, torch.arange(5), (x, y), sampler=sampler, solver="cg", tol=1e-10
    )
    A = 0.0
    for i, w in zip(sampler.indices.tolist(), sampler.weights.double(), strict=True):
        H = fi.Hessian(model, F.cross_entropy, (x[i : i + 1], y[i : i + 1]))
        A = A + w * (H @ torch.eye(H.dim, dtype=torch.float64))
    lam = got.solve.damping
    expected = torch.linalg.solve(A + lam * torch.eye(51), got.gradient)
    torch.testing.assert_close(got.delta, expected, rtol=1e-6, atol=1e-9)
    assert got.rows is not None
    assert torch.equal(got.rows, sampler.indices)
    for source in (TensorDataset(x, y), Rows(x, y)):
        again = fi.influence(
            model,
            F.cross_entropy,
            torch.arange(5),
            source,
            sampler=sampler,
            solver="exact",
            damping=lam,
            chunk_size=3,
        )
        torch.testing.assert_close(again.delta, got.delta, rtol=1e-6, atol=1e-9)


def test_solvers_agree() -> None:
    model, x, y = mlp()
    deltas = [
        fi.influence(
            model, F.cross_entropy, torch.arange(9), (x, y), solver=solver, damping="auto", tol=1e-8
        ).delta
        for solver in ("lissa", "cg", "exact")
    ]
    torch.testing.assert_close(deltas[0], deltas[2], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(deltas[1], deltas[2], rtol=1e-5, atol=1e-7)


def test_model_and_generator_are_left_alone() -> None:
    model, x, y = mlp()
    model.train()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    loader = DataLoader(TensorDataset(x[:9], y[:9]), batch_size=4, shuffle=True)
    fi.influence(model, F.cross_entropy, loader, TensorDataset(x, y))
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


class TestErrors:
    def call(self, **changes: Any) -> Any:
        model, x, y = mlp()
        given: dict[str, Any] = {"removed": torch.arange(3), "train": (x, y), "damping": 0.5}
        return fi.influence(model, F.cross_entropy, **(given | changes))

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"variant": "xif"}, ValueError, "variant must be one of .*'xif'"),
            ({"solver": "magic"}, ValueError, "solver must be one of .*'magic'"),
            ({"removed": torch.tensor([0, 50])}, ValueError, r"removed must lie in \[0, 50\).*50"),
            ({"removed": torch.tensor([-1])}, ValueError, r"removed must lie in \[0, 50\).*-1"),
            ({"removed": torch.tensor([1.0])}, ValueError, "removed .*int64.*float32"),
            ({"removed": torch.ones(50).bool()}, ValueError, "removed .*int64.*bool"),
            ({"removed": torch.ones(2, 2).long()}, ValueError, r"removed .*\[2, 2\]"),
            ({"removed": torch.empty(0).long()}, ValueError, "removed must be a non-empty"),
            ({"removed": (torch.ones(0, 4), torch.ones(0))}, ValueError, "no rows"),
            ({"damping": -1.0}, ValueError, "damping must not be negative"),
            ({"max_iter": 0}, ValueError, "max_iter must be at least 1"),
            ({"max_iter": 0, "solver": "cg"}, ValueError, "max_iter must be at least 1"),
            ({"params": ["nothing*"]}, ValueError, r"'nothing\*' matches no"),
            ({"sampler": [1, 2]}, TypeError, "sampler must have .*indices.*weights.*list"),
        ],
    )
    def test_arguments(self, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            self.call(**changes)

    def test_sampler_of_another_set(self) -> None:
        sampler = SimpleNamespace(indices=torch.tensor([0, 77]), weights=torch.ones(2) / 2)
        with pytest.raises(ValueError, match=r"sampler\.indices must lie in \[0, 50\)"):
            self.call(sampler=sampler)
        sampler = SimpleNamespace(indices=torch.tensor([0, 7]), weights=torch.ones(3) / 3)
        with pytest.raises(ValueError, match="2 rows of data"):
            self.call(sampler=sampler)

    def test_training_set_without_rows_to_choose(self) -> None:
        _, x, y = mlp()
        with pytest.raises(TypeError, match="rows are chosen"):
            self.call(train=DataLoader(TensorDataset(x, y)))

        class Stream(IterableDataset[Any]):
            def __iter__(self) -> Any:
                return zip(x, y, strict=True)

        with pytest.raises(TypeError, match="no length"):
            self.call(train=Stream())

    def test_indefinite_subset(self) -> None:
        with pytest.raises(fi.SolverDivergence, match="Use damping >"):
            self.call(damping=1e-4)
        assert self.call(damping="auto").solve.converged

    def test_unfinished_solve_is_warned_of(self) -> None:
        with pytest.warns(UserWarning, match="lissa: residual"):
            assert not self.call(max_iter=1, tol=1e-9).solve.converged
