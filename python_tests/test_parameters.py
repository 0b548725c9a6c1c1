"""Selections of parameters and updates of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import fastif_ext as fi
from fastif_ext.parameters import Selection

TOTAL = 6 + 3 + 3 + 1


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
        (["2.bias", "0.weight"], ["0.weight", "2.bias"]),
        (["*.bias"], ["0.bias", "2.bias"]),
        (["[2-9].*", "2.bias"], ["2.weight", "2.bias"]),
        (("2.*",), ["2.weight", "2.bias"]),
        ((name for name in ["2.*"]), ["2.weight", "2.bias"]),
    ],
)
def test_names_and_patterns_in_the_order_of_the_model(params: Any, names: list[str]) -> None:
    selection = Selection(network(), params)
    assert list(selection.touched) == names
    assert selection.dim == sum(p.numel() for p in selection.touched.values())
    assert selection.total == TOTAL


def test_module() -> None:
    model = network()
    assert list(Selection(model, model[2]).touched) == ["2.weight", "2.bias"]
    assert Selection(model, model).dim == TOTAL


def test_frozen_parameters_do_not_count() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    selection = Selection(model)
    assert selection.total == selection.dim == TOTAL - 6
    assert list(Selection(model, model[0]).touched) == ["0.bias"]


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert Selection(model).total == 4
    assert list(Selection(model, model[1]).touched) == ["0.weight"]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.booleans(), min_size=TOTAL, max_size=TOTAL).filter(any), st.integers(0, 3))
def test_mask_split_join_embed(bits: list[bool], rows: int) -> None:
    model, mask = network(), torch.tensor(bits)
    selection = Selection(model, mask)
    assert selection.dim == int(mask.sum())
    v = torch.arange(1.0, rows * selection.dim + 1).view(rows, selection.dim)
    parts = selection.split(v)
    assert [part.shape[1:] for part in parts] == [p.shape for p in selection.touched.values()]
    assert torch.equal(selection.join(parts), v)
    assert sum(int((part != 0).sum()) for part in parts) == v.numel()
    full = selection.embed(v)
    assert full.shape == (rows, TOTAL)
    assert torch.equal(full[:, mask], v)
    assert not full[:, ~mask].any()
    if rows:
        assert torch.equal(selection.embed(v[0]), full[0])


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ("0.weight", TypeError, "a list of names or patterns, got the str '0.weight'"),
        (["head.*"], ValueError, r"'head\.\*' matches no .*there are: 0\.weight"),
        (["0.*", "3.*"], ValueError, r"'3\.\*' matches no"),
        ([], ValueError, "selects no"),
        (nn.Linear(2, 2), ValueError, "selects no"),
        (torch.zeros(TOTAL, dtype=torch.bool), ValueError, "selects no"),
        (torch.ones(TOTAL - 1, dtype=torch.bool), ValueError, f"length {TOTAL}.*{TOTAL - 1}"),
        (torch.ones(TOTAL), ValueError, "must be bool.*float32"),
        (3, TypeError, "params must be None, .*got int"),
    ],
)
def test_errors(params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Selection(network(), params)


def test_nothing_trainable() -> None:
    model = network().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        Selection(model)


class TestApplyUpdate:
    def test_moves_a_copy(self) -> None:
        model = network()
        model[0].bias.requires_grad_(False)
        before = parameters_to_vector(model.parameters()).detach().clone()
        delta = torch.randn(TOTAL - 3, dtype=torch.float64)
        moved = fi.apply_update(model, delta, step=-0.5)
        assert torch.equal(parameters_to_vector(model.parameters()), before)
        change = parameters_to_vector(moved.parameters()).detach() - before
        trainable = torch.ones(TOTAL, dtype=torch.bool)
        trainable[6:9] = False
        torch.testing.assert_close(change[trainable], (-0.5 * delta).float(), rtol=1e-4, atol=1e-6)
        assert not change[~trainable].any()

    def test_keeps_mode_and_grad_flags(self) -> None:
        model = network()
        model[0].weight.requires_grad_(False)
        model.eval()
        moved = fi.apply_update(model, torch.zeros(TOTAL - 6))
        assert not moved.training
        assert not moved[0].weight.requires_grad
        assert moved[0].bias.requires_grad

    def test_tied_weights_move_once(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        model[1].weight = model[0].weight
        moved = fi.apply_update(model, torch.ones(4))
        assert moved[1].weight is moved[0].weight
        torch.testing.assert_close(moved[0].weight, model[0].weight + 1)

    @pytest.mark.parametrize("delta", [torch.ones(TOTAL + 1), torch.ones(1, TOTAL)])
    def test_wrong_length(self, delta: Tensor) -> None:
        with pytest.raises(ValueError, match=f"{TOTAL} trainable"):
            fi.apply_update(network(), delta)
