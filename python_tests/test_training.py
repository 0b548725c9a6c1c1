"""Training: the optimum, reproducibility, what it leaves untouched, and bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastif_ext import datasets, models, training


@pytest.fixture
def data() -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    y = torch.arange(90) % 3
    x = torch.randn(90, 5, generator=g, dtype=torch.float64)
    x[:, :3] += 1.5 * F.one_hot(y, 3)
    return TensorDataset(x, y)


def network(*extra: nn.Module, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), *extra, nn.Tanh(), nn.Linear(8, 3)).double()


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


class Interrupting(nn.Module):
    """Raises KeyboardInterrupt at a given call."""

    def __init__(self, inner: nn.Module, at: int) -> None:
        super().__init__()
        self.inner, self.at, self.calls = inner, at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.inner(x)


def test_train_learns_and_reports_the_loss_of_each_epoch(data: TensorDataset) -> None:
    model = network()
    losses = training.train(model, data, epochs=40, batch_size=16, lr=0.03)
    assert len(losses) == 40
    assert losses[-1] < 0.5 * losses[0]
    assert training.accuracy(model, data) > 0.85


def test_first_loss_is_the_mean_over_rows(data: TensorDataset) -> None:
    model = network()
    want = F.cross_entropy(model(data.tensors[0]), data.tensors[1]).item()
    # steps too small to matter; the last batch has 10 rows, not 16
    [loss] = training.train(model, data, epochs=1, batch_size=16, lr=1e-12)
    assert loss == pytest.approx(want, rel=1e-6)


def test_one_full_batch_is_one_adam_step(data: TensorDataset) -> None:
    model = network()
    twin = copy.deepcopy(model)
    training.train(model, data, epochs=1, batch_size=90, lr=0.01, weight_decay=0.1)
    x, y = data.tensors
    theta = sum((p * p).sum() for p in twin.parameters())
    (F.cross_entropy(twin(x), y) + 0.1 / 2 * theta).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert q.grad is not None
        # Adam's first step is lr g / (|g| + eps)
        torch.testing.assert_close(p, q - 0.01 * q.grad / (q.grad.abs() + 1e-8))


def test_weight_decay_shrinks(data: TensorDataset) -> None:
    norms = []
    for weight_decay in (0.0, 0.1):
        model = network()
        training.train(model, data, epochs=30, lr=0.02, weight_decay=weight_decay)
        norms.append(float(flat(model).norm()))
    assert norms[1] < 0.7 * norms[0]


def test_same_seed_same_weights(data: TensorDataset) -> None:
    def run(seed: int) -> Tensor:
        model = network(nn.Dropout(0.3))
        torch.rand(seed + 1)  # the state of the global generator has no say
        training.train(model, data, epochs=3, batch_size=16, lr=0.01, seed=seed)
        return flat(model)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_train_leaves_the_global_generator_alone(data: TensorDataset) -> None:
    model = network(nn.Dropout(0.5))
    before = torch.get_rng_state()
    training.train(model, data, epochs=1, lr=0.01)
    assert torch.equal(torch.get_rng_state(), before)


def test_modes_and_gradients_are_restored(data: TensorDataset) -> None:
    model = network(nn.Dropout(0.5))
    model.train()
    model[1].eval()
    training.train(model, data, epochs=1, lr=0.01)
    assert [m.training for m in model] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("rows", [33, 32, 34])
def test_batch_norm_with_a_last_batch_of_one(data: TensorDataset, rows: int) -> None:
    model = network(nn.BatchNorm1d(8))
    part = TensorDataset(*(t[:rows] for t in data.tensors))
    training.train(model, part, epochs=2, batch_size=16, lr=0.01)
    assert int(model[1].num_batches_tracked) == {33: 4, 32: 4, 34: 6}[rows]
    assert flat(model).isfinite().all()


def test_without_batch_norm_no_row_is_left_out(data: TensorDataset) -> None:
    model = Interrupting(network(), at=-1)
    part = TensorDataset(*(t[:33] for t in data.tensors))
    training.train(model, part, epochs=1, batch_size=16, lr=0.01)
    assert model.calls == 3


def test_frozen_parameters_stay(data: TensorDataset) -> None:
    model = network()
    model[0].requires_grad_(False)
    frozen, free = flat(model[0]), flat(model[2])
    training.train(model, data, epochs=1, lr=0.01)
    training.train_lbfgs(model, *data.tensors, l2=0.1, tol=1e-4)
    assert torch.equal(flat(model[0]), frozen)
    assert not torch.equal(flat(model[2]), free)


def test_a_pair_trains_as_a_tensor_dataset(data: TensorDataset) -> None:
    one, two = network(), network()
    training.train(one, data, epochs=2, lr=0.01)
    training.train(two, data.tensors, epochs=2, lr=0.01)
    assert torch.equal(flat(one), flat(two))


def test_train_can_be_interrupted(data: TensorDataset) -> None:
    model = Interrupting(network(), at=4)
    model.eval()
    start, before = flat(model), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        training.train(model, data, epochs=9, batch_size=16, lr=0.01)
    assert not torch.equal(flat(model), start)  # three steps were made
    assert flat(model).isfinite().all()
    assert not any(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert 0 <= training.accuracy(model, data) <= 1


def test_divergence_is_an_error(data: TensorDataset) -> None:
    x, y = data.tensors
    bad = x.clone()
    bad[7, 2] = torch.nan
    with pytest.raises(RuntimeError, match=r"loss of epoch 1 is nan; lower lr \(now 0.01\)"):
        training.train(network(), (bad, y), epochs=1, lr=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs = 0 must be finite and positive"),
        ({"batch_size": -1}, "batch_size = -1"),
        ({"lr": 0.0}, "lr = 0.0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"weight_decay": -1.0}, "weight_decay = -1.0 must be finite and at least 0"),
    ],
)
def test_train_refuses_bad_numbers(
    data: TensorDataset, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        training.train(network(), data, **{"epochs": 1, "lr": 0.01, **change})


def test_train_refuses_bad_data(data: TensorDataset) -> None:
    x, y = data.tensors
    with pytest.raises(TypeError, match="got a TensorDataset of 1"):
        training.train(network(), TensorDataset(x), epochs=1)
    with pytest.raises(TypeError, match="got a DataLoader"):
        training.train(network(), DataLoader(data), epochs=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="90 rows and targets 89"):
        training.train(network(), (x, y[1:]), epochs=1)
    with pytest.raises(ValueError, match="0 rows"):
        training.train(network(), (x[:0], y[:0]), epochs=1)
    with pytest.raises(ValueError, match=r"int64 labels \[n\], got torch.float64"):
        training.train(network(), (x, x), epochs=1)
    with pytest.raises(ValueError, match="nothing to train"):
        training.train(network().requires_grad_(False), data, epochs=1)


def test_lbfgs_reaches_the_minimum_of_a_convex_problem(data: TensorDataset) -> None:
    x, y = data.tensors
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    result = training.train_lbfgs(model, x, y, l2=0.05, tol=1e-10)
    assert result.converged
    assert result.gradient_norm <= 1e-10
    assert 0 < result.iterations < 200
    theta = torch.cat([model.weight.flatten(), model.bias]).detach().requires_grad_()

    def objective(t: Tensor) -> Tensor:
        logits = x @ t[:15].reshape(3, 5).T + t[15:]
        return -logits.log_softmax(1)[torch.arange(90), y].mean() + 0.05 / 2 * t.dot(t)

    assert result.loss == pytest.approx(objective(theta).item(), rel=1e-12)
    gradient = torch.autograd.grad(objective(theta), theta)[0]
    assert float(gradient.norm()) == pytest.approx(result.gradient_norm, abs=1e-12)
    # 0.05-strongly convex: the distance to the minimum is at most |gradient| / 0.05
    hessian = torch.autograd.functional.hessian(objective, theta.detach())
    assert torch.linalg.eigvalsh(hessian)[0] >= 0.05 - 1e-12


def test_lbfgs_on_digits() -> None:
    digits = datasets.load("digits")
    model = models.build("mlp", dtype=torch.float64)
    result = training.train_lbfgs(model, *digits.train.tensors, l2=1e-3, tol=1e-3)
    assert result.converged
    assert training.accuracy(model, digits.test) > 0.97


def test_lbfgs_warns_where_tol_is_not_reached(data: TensorDataset) -> None:
    with pytest.warns(RuntimeWarning, match=r"after 3 iterations, tol = 1e-06: raise max_iter"):
        result = training.train_lbfgs(network(), *data.tensors, l2=0.01, max_iter=3)
    assert not result.converged
    assert result.iterations == 3
    x, y = data.tensors
    with pytest.warns(RuntimeWarning, match="no longer changes in torch.float32; .* or float64"):
        training.train_lbfgs(network().float(), x.float(), y, l2=0.05, tol=1e-12)


def test_lbfgs_at_the_minimum_does_nothing(data: TensorDataset) -> None:
    model = nn.Linear(5, 3).double()
    training.train_lbfgs(model, *data.tensors, l2=0.05)
    before = flat(model)
    result = training.train_lbfgs(model, *data.tensors, l2=0.05)
    assert (result.iterations, result.converged) == (0, True)
    assert torch.equal(flat(model), before)


def test_lbfgs_uses_eval_mode_and_restores(data: TensorDataset) -> None:
    model = network(nn.Dropout(0.5), nn.BatchNorm1d(8)).train()
    training.train_lbfgs(model, *data.tensors, l2=0.1, tol=1e-5)
    assert int(model[2].num_batches_tracked) == 0
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_lbfgs_can_be_interrupted(data: TensorDataset) -> None:
    for at in range(2, 60, 7):
        model = Interrupting(network(), at=at)
        with torch.no_grad():
            start = F.cross_entropy(model.inner(data.tensors[0]), data.tensors[1])
        with pytest.raises(KeyboardInterrupt):
            training.train_lbfgs(model, *data.tensors, tol=1e-14)
        # a trial point of the line search could be anywhere; the last iterate is not
        with torch.no_grad():
            assert F.cross_entropy(model.inner(data.tensors[0]), data.tensors[1]) <= start


def test_lbfgs_refuses(data: TensorDataset) -> None:
    x, y = data.tensors
    for change, message in (
        ({"l2": -1.0}, "l2 = -1.0 must be finite and at least 0"),
        ({"tol": 0.0}, "tol = 0.0 must be finite and positive"),
        ({"max_iter": 0}, "max_iter = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            training.train_lbfgs(network(), x, y, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="90 rows and targets 3"):
        training.train_lbfgs(network(), x, y[:3])
    with pytest.raises(RuntimeError, match="the objective is nan"):
        training.train_lbfgs(network(), x / 0, y)


def test_accuracy(data: TensorDataset) -> None:
    x, y = data.tensors
    model = network(nn.Dropout(0.9)).train()
    want = float((model.eval()(x).argmax(1) == y).double().mean())
    model.train()
    for given in (data, (x, y), DataLoader(data, batch_size=7)):
        assert training.accuracy(model, given, batch_size=13) == pytest.approx(want, abs=1e-12)
    assert model.training
    with pytest.raises(ValueError, match="dataset is empty"):
        training.accuracy(model, (x[:0], y[:0]))
