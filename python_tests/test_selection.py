"""select_parameters by hand, and what it must leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastif_ext as fi

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(F.relu(self.norm(self.conv(x)))).flatten(1))


def data(n: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 1, 4, 4), torch.randint(5, (n,))


def masks(model: nn.Module, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    sizes = [p.numel() for p in model.parameters()]
    return {
        name: part.view_as(p)
        for (name, p), part in zip(model.named_parameters(), mask.split(sizes), strict=True)
    }


@pytest.mark.parametrize("by", ["output", "gradient"])
def test_by_hand(by: str) -> None:
    """The units with the largest |mean| over examples and positions, their rows and biases."""
    model, (x, y) = Net().train(), data()
    got = masks(model, fi.select_parameters(model, (x, y), 0.5, by=by))
    net = copy.deepcopy(model).eval()
    conv = net.conv(x)
    conv.retain_grad()
    head = net.head(F.relu(net.norm(conv)).flatten(1))
    head.retain_grad()
    F.cross_entropy(head, y).backward()
    for name, out in (("conv", conv), ("head", head)):
        value = out if by == "output" else out.grad
        mean = value.transpose(0, 1).flatten(1).mean(1).abs()
        units = mean.topk(len(mean) // 2).indices  # floor(.5 * 4) = 2, floor(.5 * 5) = 2
        want = torch.zeros(len(mean), dtype=torch.bool)
        want[units] = True
        assert torch.equal(got[f"{name}.bias"], want)
        assert torch.equal(got[f"{name}.weight"].flatten(1).all(1), want)
        assert torch.equal(got[f"{name}.weight"].flatten(1).any(1), want)
    assert not got["norm.weight"].any()


def test_batches_do_not_matter_and_nothing_is_changed() -> None:
    model, (x, y) = Net().train(), data(60)
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 7)
    for by in ("output", "gradient"):
        a = fi.select_parameters(model, (x, y), 0.4, by=by)
        assert torch.equal(a, fi.select_parameters(model, loader, 0.4, by=by))
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_frozen_and_tied_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    x, y = torch.randn(9, 3), torch.randint(3, (9,))
    mask = fi.select_parameters(model, (x, y), 1.0)
    assert mask.shape == (12,)  # the weight once, the second bias
    assert mask.all()


def test_it_selects_for_influence() -> None:
    model, (x, y) = Net().double(), data(40)
    mask = fi.select_parameters(model, (x.double(), y), 0.5)
    got = fi.influence(
        model, F.cross_entropy, torch.arange(5), (x.double(), y), variant="gif", params=mask,
        solver="cg", damping=0.1,
    )  # fmt: skip
    assert got.delta[~mask].abs().max() == 0
    assert got.delta[mask].abs().max() > 0


def test_bad_input() -> None:
    model, d = Net(), data()
    for ratio in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\]"):
            fi.select_parameters(model, d, ratio)
    with pytest.raises(ValueError, match="by must be 'output' or 'gradient', got 'loss'"):
        fi.select_parameters(model, d, 0.5, by="loss")
    with pytest.raises(ValueError, match=r"selects nothing of the \[4, 5\] output units"):
        fi.select_parameters(model, d, 0.1)
    norm = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="no output of a Linear or Conv module"):
        fi.select_parameters(norm, (torch.randn(4, 3), torch.zeros(4).long()), 0.5)
