"""Scores against dense algebra and against true leave-one-out retraining."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import CASES, DOUBLE, N, case, gradients, split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastif_ext as fi
from fastif_ext.training import train_lbfgs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunks", [(64, 256), (3, 5)])
def test_equals_dense_algebra(name: str, chunks: tuple[int, int]) -> None:
    model, loss, x, y = case(name)
    train, test = split(x, y)
    H = fi.GaussNewton(model, train, loss_fn=loss) @ torch.eye(
        sum(p.numel() for p in model.parameters()), dtype=DOUBLE
    )
    A = H + 0.1 * torch.eye(len(H), dtype=DOUBLE)
    want = gradients(model, loss, *test) @ torch.linalg.solve(A, gradients(model, loss, *train).T)
    got = fi.influence_scores(
        model, loss, train, test, curvature="gauss-newton", damping=0.1, tol=1e-11,
        test_chunk=chunks[0], train_chunk=chunks[1],
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    own = fi.self_influence(
        model, loss, train, curvature="gauss-newton", damping=0.1, tol=1e-11, chunk=chunks[1]
    )
    g = gradients(model, loss, *train)
    torch.testing.assert_close(own, (torch.linalg.solve(A, g.T).T * g).sum(1), rtol=1e-6, atol=1e-9)
    assert own.min() >= 0


class TestOptions:
    def test_indefinite_hessian_with_enough_damping(self) -> None:
        model, loss, x, y = case("mlp")
        train, test = split(x, y)
        H = fi.Hessian(model, loss, train) @ torch.eye(31, dtype=DOUBLE)
        damping = 0.01 - 2 * float(torch.linalg.eigvalsh(H)[0])
        A = H + damping * torch.eye(31, dtype=DOUBLE)
        want = gradients(model, loss, *test) @ torch.linalg.solve(
            A, gradients(model, loss, *train).T
        )
        for solver in ("cg", "lissa", "exact"):
            got = fi.influence_scores(
                model, loss, train, test, solver=solver, damping=damping, tol=1e-9,
                max_iter=None if solver == "exact" else 20_000,
            )  # fmt: skip
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        with pytest.raises(fi.SolverDivergence):
            fi.influence_scores(model, loss, train, test, damping=0.0)

    def test_selection_sampler_and_kinds_of_data(self) -> None:
        model, loss, x, y = case("mlp")
        train, test = split(x, y)
        mask = torch.rand(31) < 0.5
        sampler = SimpleNamespace(
            indices=torch.tensor([0, 4, 4, 11]), weights=torch.tensor([0.5, 0.1, 0.2, 0.4])
        )
        rows = fi.data.take(train, sampler.indices)
        H = fi.GaussNewton(model, rows, weights=sampler.weights, params=mask)
        A = H @ torch.eye(H.dim, dtype=DOUBLE) + 0.2 * torch.eye(H.dim, dtype=DOUBLE)
        g_test, g_train = (gradients(model, loss, *d)[:, mask] for d in (test, train))
        want = g_test @ torch.linalg.solve(A, g_train.T)
        options: dict[str, Any] = {"params": mask, "damping": 0.2, "tol": 1e-11}
        for kind in (lambda d: d, lambda d: TensorDataset(*d)):
            got = fi.influence_scores(
                model, loss, kind(train), kind(test), sampler=sampler, curvature="gauss-newton",
                **options,
            )  # fmt: skip
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
        loaders = (DataLoader(TensorDataset(*d), 4) for d in (train, test))
        got = fi.influence_scores(model, loss, *loaders, curvature=H, **options)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
        chosen = torch.tensor([5, 2])
        own = fi.self_influence(
            model, loss, train, rows=chosen, sampler=sampler, curvature="gauss-newton", **options
        )
        g = g_train[chosen]
        torch.testing.assert_close(own, (torch.linalg.solve(A, g.T).T * g).sum(1))

    def test_last_layer(self) -> None:
        model, loss, x, y = case("mlp")
        train, test = split(x, y)
        options: dict[str, Any] = {"damping": 0.1, "tol": 1e-11}
        want = fi.influence_scores(model, loss, train, test, params=model[2], **options)
        got = fi.influence_scores(model, loss, train, test, curvature="linear-softmax", **options)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)

    def test_automatic_damping_is_one_for_all(self) -> None:
        """Whatever examples come first, or alone; more parameters than Lanczos has steps."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 4)).double()
        x, y = torch.randn(60, 8, dtype=DOUBLE), torch.arange(60) % 4
        train, test = (x[:50], y[:50]), (x[50:], y[50:])
        a = fi.influence_scores(model, F.cross_entropy, train, test, tol=1e-10)
        for chunk in (1, 3):
            b = fi.influence_scores(
                model, F.cross_entropy, train, test, tol=1e-10, test_chunk=chunk
            )
            torch.testing.assert_close(a, b)
        alone = (x[57:58], y[57:58])
        b = fi.influence_scores(model, F.cross_entropy, train, alone, tol=1e-10)
        torch.testing.assert_close(a[7:8], b)


def test_leave_one_out_retraining() -> None:
    """Logistic regression: ranks and signs of the scores are those of true retraining."""
    torch.manual_seed(0)
    n, l2 = 80, 0.02
    y = torch.arange(n + 6) % 3
    x = torch.randn(3, 4, dtype=DOUBLE)[y] + 1.2 * torch.randn(n + 6, 4, dtype=DOUBLE)
    model = nn.Linear(4, 3, dtype=DOUBLE)
    train_lbfgs(model, x[:n], y[:n], l2=l2)
    scores = fi.influence_scores(
        model, F.cross_entropy, (x[:n], y[:n]), (x[n:], y[n:]), damping=l2, tol=1e-9
    )

    def test_losses(net: nn.Module) -> Tensor:
        with torch.no_grad():
            return F.cross_entropy(net(x[n:]), y[n:], reduction="none")

    changes = []
    for i in range(n):
        kept = torch.arange(n) != i
        net = copy.deepcopy(model)
        # the sum over the n - 1 rows that stay, over n, with the same decay
        train_lbfgs(net, x[:n][kept], y[:n][kept], l2=l2 * n / (n - 1))
        changes.append(test_losses(net) - test_losses(model))
    true = torch.stack(changes, 1)
    for t in range(6):
        ranks = torch.stack([v.argsort().argsort().double() for v in (scores[t], true[t])])
        assert float(torch.corrcoef(ranks)[0, 1]) > 0.98
        sizes = float((scores[t] / n).norm() / true[t].norm())
        assert 0.85 < sizes < 1.1
        large = true[t].abs() > true[t].abs().median()
        assert torch.equal(scores[t][large].sign(), true[t][large].sign())


def test_dict_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3, dtype=DOUBLE)

        def forward(self, *, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(torch.tanh(a + b))

    torch.manual_seed(1)
    model, y = Named(), torch.randint(3, (N,))
    a, b = torch.randn(2, N, 3, dtype=DOUBLE)
    data = {"a": a, "b": b}, y
    got = fi.influence_scores(model, F.cross_entropy, data, data, damping=0.1, tol=1e-10)
    plain = torch.tanh(a + b), y
    want = fi.influence_scores(model.layer, F.cross_entropy, plain, plain, damping=0.1, tol=1e-10)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got, got.T)


@pytest.mark.parametrize("name", ["conv", "patches"])
def test_nothing_is_changed(name: str) -> None:
    model, loss, x, y = case(name)
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    train, test = split(x, y)
    fi.influence_scores(model, loss, train, test, damping=5.0)
    fi.self_influence(model, loss, train, damping=5.0)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)


def test_bad_input() -> None:
    model, loss, x, y = case("softmax")
    train, test = split(x, y)
    scores = fi.influence_scores
    with pytest.raises(ValueError, match="chunk sizes must be at least 1, got 0"):
        scores(model, loss, train, test, train_chunk=0)
    with pytest.raises(ValueError, match="solver must be one of .* got 'lu'"):
        scores(model, loss, train, test, solver="lu")
    with pytest.raises(ValueError, match="curvature must be one of .* got 'fisher'"):
        scores(model, loss, train, test, curvature="fisher")
    H = fi.Hessian(model, loss, train)
    with pytest.raises(ValueError, match="sampler would not be used"):
        scores(model, loss, train, test, curvature=H, sampler=fi.RandomSampler(N, 5))
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 23\)"):
        fi.self_influence(model, loss, train, rows=torch.tensor([23]))
    with pytest.raises(ValueError, match=r"sampler.indices must lie in \[0, 23\)"):
        scores(model, loss, train, test, sampler=fi.RandomSampler(50, 40))

    def detached(out: Tensor, target: Tensor) -> Tensor:
        return loss(out.detach(), target)

    with pytest.raises(ValueError, match="does not depend on the selected parameters"):
        scores(model, detached, train, test, damping=1.0)
