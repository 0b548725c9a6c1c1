"""Directional derivatives of examples' losses against their gradients, by every way."""

from __future__ import annotations

import pytest
import torch
from networks import CASES, DOUBLE, OUTSIDE, N, case, gradients
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from fastif_ext import directional, products
from fastif_ext.directional import DirectionalDerivatives
from fastif_ext.example_runs import ByExample
from fastif_ext.layer_runs import Hooked
from fastif_ext.layerwise import Layers
from fastif_ext.objective import WeightedLoss
from fastif_ext.parameters import Selection

pytestmark = pytest.mark.usefixtures("one_thread")


class TestDirectionalDerivatives:
    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("count", [1, 9])
    def test_every_way_gives_the_gradients_products(self, name: str, count: int) -> None:
        model, loss, x, y = case(name)
        total = WeightedLoss(model, loss, (x, y))
        v = torch.randn(count, total.selection.dim, dtype=DOUBLE)
        directions = total.selection.split(v)
        want = v @ gradients(model, loss, x, y).T
        options = {"rtol": 1e-8, "atol": 1e-10}
        torch.testing.assert_close(
            directional.forward_mode(total, x, y, directions), want, **options
        )
        chosen = directional.DirectionalDerivatives(total)(x, y, directions)
        torch.testing.assert_close(chosen, want, **options)
        layers = Layers.of(total)
        assert (layers is None) == (name in ("tokens", "patches", "asking"))
        if layers is not None:
            found = layers.derivatives(x, y, directions)
            if name in OUTSIDE:  # rows of examples and of other things
                assert found is None
            else:
                assert torch.allclose(found, want, **options) == (name != "loose")
        if name != "asking":
            found = Layers.by_example(total).derivatives(x, y, directions)
            assert torch.allclose(found, want, **options) == (name != "loose")
        assert all(m.training for m in model.modules())
        assert not any(m._forward_hooks for m in model.modules())

    @pytest.mark.parametrize("name", CASES)
    def test_rows_of_a_pass(self, name: str) -> None:
        """More rows for a small network, within limits."""
        model, loss, x, y = case(name)
        chosen = directional.DirectionalDerivatives(WeightedLoss(model, loss, (x, y)))
        if name == "asking":
            assert chosen.layers is None
            assert chosen.rows() == 512
            return
        assert chosen.layers is not None
        most = directional.IN_FLIGHT // chosen.layers.numbers_per_row
        if chosen.layers.gradient_per_row:
            assert name in OUTSIDE or name == "loose"
            assert chosen.rows() == 512
            chosen.layers.gradient_per_row = directional.GRADIENTS // 5
            assert chosen.rows() == 5
            chosen.layers.gradient_per_row *= 10
            assert chosen.rows() == 1
            return
        assert chosen.rows() == min(8192, most)
        assert most > 4096
        if name == "mlp":  # 3 outputs after a hidden layer
            width = sum(m.out_features for m in model.modules() if isinstance(m, nn.Linear))
            assert chosen.layers.numbers_per_row == width
        chosen.layers.numbers_per_row = 10**6
        assert chosen.rows() == 32

    @pytest.mark.parametrize("name", OUTSIDE)
    def test_parameters_outside_of_layers(self, name: str) -> None:
        """They alone get gradients; whichever are selected, whatever else has its own."""
        model, loss, x, y = case(name)
        whole = WeightedLoss(model, loss, (x, y))
        outside = Selection(model, OUTSIDE[name]) if OUTSIDE[name] else None
        layers = DirectionalDerivatives(whole).layers
        assert layers is not None
        assert isinstance(layers._run, ByExample)
        assert layers.gradient_per_row == (0 if outside is None else outside.dim)
        g = gradients(model, loss, x, y)
        inside = [k for k in whole.leaves if outside is None or k not in outside.touched]
        some = torch.rand(g.shape[1]) < 0.5
        for params in (inside[::2], [inside[0], *OUTSIDE[name][:1]], OUTSIDE[name] or inside, some):
            total = WeightedLoss(model, loss, (x, y), params=params)
            v = torch.randn(4, total.selection.dim, dtype=DOUBLE)
            derivatives = DirectionalDerivatives(total)
            assert derivatives.layers is not None
            got = derivatives(x, y, total.selection.split(v))
            torch.testing.assert_close(got, v @ total.selection.restrict(g).T)

    def test_a_weight_used_outside_of_its_layer_gets_gradients(self) -> None:
        model, loss, x, y = case("loose")
        layers = DirectionalDerivatives(WeightedLoss(model, loss, (x, y))).layers
        assert layers is not None
        assert layers.gradient_per_row == 9  # and not the 3 of the bias

    def test_sequences_of_several_lengths(self) -> None:
        model, loss, x, y = case("language")
        total = WeightedLoss(model, loss, (x, y))
        derivatives = DirectionalDerivatives(total)
        v = torch.randn(2, total.selection.dim, dtype=DOUBLE)
        for length in (5, 3, 4):
            few = x[:, :length], y[:, :length]
            got = derivatives(*few, total.selection.split(v))
            torch.testing.assert_close(got, v @ gradients(model, loss, *few).T)

    @pytest.mark.parametrize("flat", ["view", "flatten"])
    def test_images_in_the_order_a_model_takes(self, flat: str) -> None:
        class Viewing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.head = nn.Conv2d(2, 3, 3), nn.Linear(48, 3)

            def forward(self, x: Tensor) -> Tensor:
                x = torch.tanh(self.a(x))
                return self.head(x.view(-1, 48) if flat == "view" else x.flatten(1))

        torch.manual_seed(0)
        model, y = Viewing().double(), torch.randint(3, (9,))
        x = torch.randn(9, 2, 6, 6, dtype=DOUBLE)
        total = WeightedLoss(model, F.cross_entropy, (x, y))
        found = DirectionalDerivatives(total)
        v = torch.randn(4, total.selection.dim, dtype=DOUBLE)
        want = v @ gradients(model, F.cross_entropy, x, y).T
        torch.testing.assert_close(found(x, y, total.selection.split(v)), want)
        assert found.layers is not None
        run = found.layers._run
        assert isinstance(run, Hooked)
        assert run._channels_last == (flat == "flatten")

    @pytest.mark.parametrize("way", ["pruned", "low rank"])
    def test_layers_with_parameters_of_other_names(self, way: str) -> None:
        """Weights that are made of other parameters just before the layer runs."""
        model, loss, x, y = case("mlp")
        layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
        if way == "pruned":
            prune.l1_unstructured(layer, "weight", amount=0.4)
        else:
            layer.register_parameter("down", nn.Parameter(torch.randn(1, 2, dtype=DOUBLE)))
        total = WeightedLoss(model, loss, (x, y))
        v = torch.randn(4, total.selection.dim, dtype=DOUBLE)
        directions = total.selection.split(v)
        want = directional.forward_mode(total, x, y, directions)
        got = directional.DirectionalDerivatives(total)(x, y, directions)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
        assert got.abs().max() > 0.01

    def test_memory_that_runs_out_is_not_a_reason_for_forward_mode(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        model, loss, x, y = case("patches")
        monkeypatch.setattr(ByExample, "__call__", full)
        with pytest.raises(torch.OutOfMemoryError):
            directional.DirectionalDerivatives(WeightedLoss(model, loss, (x, y)))

    def test_gradients_a_few_rows_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, loss, x, y = case("conv")
        total = WeightedLoss(model, loss, (x, y))
        layers = Layers.of(total)
        assert layers is not None
        directions = total.selection.split(torch.randn(9, total.selection.dim, dtype=DOUBLE))
        want = layers.derivatives(x, y, directions)
        monkeypatch.setattr(products, "BLOCK", 500)
        torch.testing.assert_close(layers.derivatives(x, y, directions), want)

    def test_sequences_through_linear_layers(self) -> None:
        """Several places per example, few and many directions."""
        torch.manual_seed(0)

        class Mean(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(torch.tanh(self.layer(x))).mean(1)

        model = Mean().double()
        x, y = torch.randn(6, 5, 3, dtype=DOUBLE), torch.randint(3, (6,))
        total = WeightedLoss(model, F.cross_entropy, (x, y))
        layers = Layers.of(total)
        assert layers is not None
        for count in (2, 7):
            v = torch.randn(count, total.selection.dim, dtype=DOUBLE)
            got = layers.derivatives(x, y, total.selection.split(v))
            torch.testing.assert_close(got, v @ gradients(model, F.cross_entropy, x, y).T)


def test_dict_inputs_and_a_parameter_outside_of_layers() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(4, 3), nn.Linear(3, 3)
            self.mix = nn.Parameter(torch.randn(3, 3))

        def forward(self, *, words: Tensor, mask: Tensor) -> Tensor:
            x = torch.tanh(self.table(words) @ self.mix) * mask[..., None]
            return self.head(x.sum(1))

    torch.manual_seed(1)
    model, words, y = Named().double(), torch.randint(4, (N, 5)), torch.randint(3, (N,))
    mask = (torch.rand(N, 5) < 0.7).double()
    data = {"words": words, "mask": mask}, y
    total = WeightedLoss(model, F.cross_entropy, data)
    derivatives = DirectionalDerivatives(total)
    assert derivatives.layers is not None
    v = torch.randn(3, total.selection.dim, dtype=DOUBLE)
    want = []
    for i in range(N):
        loss = F.cross_entropy(model(words=words[i, None], mask=mask[i, None]), y[i, None])
        g = dict(zip(total.leaves, torch.autograd.grad(loss, model.parameters()), strict=True))
        want.append(v @ torch.cat([t.flatten() for t in g.values()]))
    got = derivatives(*data, total.selection.split(v))
    torch.testing.assert_close(got, torch.stack(want, 1))


@pytest.mark.parametrize("name", ["softmax", "conv", "patches"])
def test_labels_that_are_ignored_and_labels_that_are_wrong(name: str) -> None:
    model, loss, x, y = case(name)
    total = WeightedLoss(model, loss, (x, y))
    derivatives = DirectionalDerivatives(total)
    directions = total.selection.split(torch.ones(1, total.selection.dim, dtype=DOUBLE))
    plain, y = derivatives(x, y, directions), y.clone()
    y[4] = -100
    got = derivatives(x, y, directions)
    assert not got[0, 4].any()
    y[4] = 0
    assert derivatives(x, y, directions)[0, 4] != 0
    torch.testing.assert_close(got[:, :4], plain[:, :4])
    for label in (-1, 3):
        y[4] = label
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            derivatives(x, y, directions)
