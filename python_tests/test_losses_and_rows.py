"""Losses, targets and rows that are not what the first rows look like, against plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastif_ext as fi
from fastif_ext.curvature import factor, make_curvature

pytestmark = pytest.mark.usefixtures("one_thread")

DOUBLE = torch.float64
KINDS = ["hessian", "gauss-newton"]


def plain(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of which nothing is known: all goes through autograd."""
    return F.cross_entropy(outputs, targets)


def rows(n: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, 3, dtype=DOUBLE), torch.arange(n) % 3


class Focal(nn.CrossEntropyLoss):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        ce = F.cross_entropy(outputs, targets, reduction="none")
        return ((1 - (-ce).exp()) ** 2 * ce).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_a_subclass_of_cross_entropy_is_a_loss_of_its_own(kind: str) -> None:
    (x, y), model, focal = rows(12), nn.Linear(3, 3).double(), Focal()
    w, v = torch.rand(12, dtype=DOUBLE), torch.randn(2, 12, dtype=DOUBLE)
    for own in (focal, lambda o, t: focal(o, t)):
        H = make_curvature(kind, model, own, (x, y), weights=w)
        eye = torch.eye(12, dtype=DOUBLE)
        scores = fi.influence_scores(model, own, (x, y), (x[:2], y[:2]), curvature=eye)
        found = H @ v, fi.mean_gradient(model, own, (x, y), weights=w), scores
        if own is focal:
            first = found
    for a, b in zip(first, found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_that_do_not_add_up_to_one(kind: str, layers: int) -> None:
    """The first rows do; several labels at once count for more."""
    x, y = rows(12)
    targets = F.one_hot(y, 3).double()
    targets[6:] = torch.tensor([1.0, 1.0, 0.0], dtype=DOUBLE)
    hidden = [nn.Linear(3, 3), nn.Tanh()] * (layers - 1)
    model = nn.Sequential(*hidden, nn.Linear(3, 3)).double()
    smooth = nn.CrossEntropyLoss(label_smoothing=0.2)
    for own, other in ((F.cross_entropy, plain), (smooth, lambda o, t: smooth(o, t))):
        got = make_curvature(kind, model, own, (x, targets))
        want = make_curvature(kind, model, other, (x, targets))
        v = torch.randn(3, got.dim, dtype=DOUBLE)
        torch.testing.assert_close(got @ v, want @ v)


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_labels_weigh_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor, "LEAST_WORK", 1)
    monkeypatch.setattr(factor, "LEAST_ROWS", 1)
    monkeypatch.setattr(factor, "MOST_ROWS", 10**6)
    x, y = rows(100)
    y[70:90] = -100
    w, kept = torch.full((100,), 0.01, dtype=DOUBLE), y >= 0
    model = nn.Sequential(nn.Linear(3, 3)).double()
    H = make_curvature(kind, model, F.cross_entropy, (x, y), weights=w)
    want = make_curvature(kind, model, plain, (x[kept], y[kept]), weights=w[kept])
    v = torch.randn(3, 12, dtype=DOUBLE)
    torch.testing.assert_close(H @ v, want @ v)
    M = H.preconditioner(0.3, 1000)  # of all rows: the inverse itself
    assert M is not None
    torch.testing.assert_close(M @ (want @ v + 0.3 * v), v, rtol=0, atol=1e-9)


def test_losses_that_are_no_mean_say_so_themselves() -> None:
    x, y = rows(100)
    y = torch.arange(100) // 70  # the first 64 rows are of one class
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 1.0], dtype=DOUBLE))
    model = nn.Linear(3, 3).double()
    with pytest.raises(ValueError, match="one with class weights divides by the sum"):
        fi.mean_gradient(model, weighted, (x, y))
    sizes = [[0], list(range(1, 9)), list(range(9, 17))]  # the first batch cannot be halved
    uneven = DataLoader(TensorDataset(x, x), batch_sampler=sizes)
    with pytest.raises(ValueError, match="it has reduction='sum'. Use reduction='mean'"):
        fi.mean_gradient(model, nn.MSELoss(reduction="sum"), uneven, chunk_size=8)


def test_scores_where_the_first_rows_have_no_gradient() -> None:
    """A weight that is used outside of its layer, too, is only seen where units are alive."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.o = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(F.relu(F.linear(F.relu(self.l(x)), self.l.weight)))

    x, y = rows(12)
    model = Net().double()
    model.l.weight.data.abs_()
    x[:3] = -x[:3].abs()
    g = torch.stack(
        [
            torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), model.l.weight)[
                0
            ].flatten()
            for i in range(12)
        ]
    )
    scores = fi.influence_scores(
        model,
        F.cross_entropy,
        (x, y),
        (x, y),
        params=["l.weight"],
        curvature=torch.zeros(9, 9, dtype=DOUBLE),
        damping=1.0,
    )
    torch.testing.assert_close(scores, g @ g.T)


def test_a_loader_of_removed_points_counts_its_rows() -> None:
    (x, y), model = rows(100), nn.Linear(3, 3).double()
    data, some = TensorDataset(x, y), fi.RandomSampler(100, 10, seed=0)
    for removed, share in (
        (DataLoader(data, 5, sampler=some), 0.1),
        (DataLoader(data, 16, drop_last=True), 0.96),
        (some.indices, 0.1),
    ):
        result = fi.influence(model, F.cross_entropy, removed, data, damping=0.1)
        assert result.step == pytest.approx(share)


def test_several_right_hand_sides_in_half_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).bfloat16()
    x, y = torch.randn(20, 3).bfloat16(), torch.arange(20) % 3
    options: dict[str, Any] = {"damping": 0.1, "curvature": "gauss-newton", "tol": 0.05}
    scores = fi.influence_scores(model, F.cross_entropy, (x, y), (x[:4], y[:4]), **options)
    assert scores.shape == (4, 20)
    assert scores.isfinite().all()


class TestLinearSoftmax:
    def test_a_tied_or_half_frozen_layer_is_refused(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.words, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
                self.out.weight = self.words.weight

            def forward(self, x: Tensor) -> Tensor:
                return self.out(self.words(x).mean(1))

        data = torch.randint(5, (20, 2)), torch.arange(20) % 5
        with pytest.raises(ValueError, match="its weight is used elsewhere, too"):
            make_curvature("linear-softmax", Tied(), F.cross_entropy, data, params=["words.weight"])
        (x, y), model = rows(12), nn.Linear(3, 3).double()
        model.bias.requires_grad_(False)
        with pytest.raises(ValueError, match="its bias or weight is frozen"):
            make_curvature("linear-softmax", model, F.cross_entropy, (x, y), params=["weight"])

    def test_inputs_in_a_dict(self) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(x)

        (x, y), model = rows(12), Named().double()
        got, want = (
            make_curvature("linear-softmax", model, F.cross_entropy, data)
            for data in (({"x": x}, y), (x, y))
        )
        v = torch.ones(12, dtype=DOUBLE)
        torch.testing.assert_close(got @ v, want @ v)


def test_arguments() -> None:
    (x, y), model = rows(30), nn.Linear(3, 3).double()
    for bad in (torch.tensor([100]), torch.tensor([-1]), torch.ones(30, dtype=torch.bool)):
        with pytest.raises(ValueError, match="removed must"):
            fi.diagnose(
                model,
                F.cross_entropy,
                (x, y),
                bad,
                lambda e, seed: fi.CurvatureSampler(e.logits, 10, seed=seed),
            )
    for options, message in (
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"step_norm": -1.0}, "step_norm must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            fi.remove_class(model, (x, y), 1, test=(x, y), protocol="paper", **options)
