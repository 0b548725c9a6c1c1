"""The simulated device itself: it refuses what a GPU refuses, and notes what a GPU waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

Mover = Callable[[Tensor], Tensor]


def test_results_and_gradients_are_those_of_the_cpu(simulated: Mover) -> None:
    x, w = torch.randn(5, 3), torch.randn(3)
    found = []
    for move in (lambda t: t.clone(), simulated):
        a, b = move(x).requires_grad_(), move(w).requires_grad_()
        (g,) = torch.autograd.grad((a @ b).tanh().sum(), b, create_graph=True)
        (gg,) = torch.autograd.grad(g.square().sum(), b)
        assert gg.device == a.device
        found.append(gg.cpu())
    torch.testing.assert_close(found[0], found[1])


def test_in_place_and_views_reach_the_same_memory(simulated: Mover) -> None:
    x = simulated(torch.zeros(4))
    view = x[1:3]
    view += 2
    assert x.add_(1) is x
    assert x.cpu().tolist() == [1, 3, 3, 1]


def test_mixed_devices_and_generators_are_refused(simulated: Mover) -> None:
    x = simulated(torch.zeros(4))
    with pytest.raises(RuntimeError, match="on simulated:0 and on the CPU"):
        x + torch.zeros(4)
    with pytest.raises(RuntimeError, match="indices on simulated:0"):
        torch.zeros(4)[simulated(torch.tensor([0]))]
    with pytest.raises((RuntimeError, TypeError)):
        x.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device="simulated", generator=torch.Generator())


def test_traffic_is_noted(simulated: Mover, traffic: Any) -> None:
    x = simulated(torch.arange(4.0))
    assert len(traffic.uploads) == 1
    assert not traffic.waits
    assert float(x.sum()) == 6
    assert len(traffic.waits) == 1
    assert x[x > 1].cpu().tolist() == [2, 3]
    assert len(traffic.waits) == 3
    assert x[torch.tensor([0])].shape == (1,)
    assert len(traffic.uploads) == 2
