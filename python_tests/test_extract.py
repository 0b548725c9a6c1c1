"""One pass over a loader: values, order, layers, and what must stay as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fastif_ext as fi


@pytest.fixture
def data() -> TensorDataset:
    return TensorDataset(torch.randn(23, 6), torch.arange(23) % 3)


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3)
    )


def run(model: nn.Module, data: Dataset[Any], **kwargs: Any) -> fi.Extracted:
    return fi.extract(model, DataLoader(data, batch_size=5), progress=False, **kwargs)


def test_logits_features_labels_in_order(model: nn.Module, data: TensorDataset) -> None:
    got = run(model, data, layer="penultimate")
    x, y = data.tensors
    model.eval()
    torch.testing.assert_close(got.logits, model(x).detach())
    torch.testing.assert_close(got.features, model[:4](x).detach())
    assert torch.equal(got.labels, y)
    assert not got.logits.requires_grad


def test_named_layer_is_its_output_and_a_callable_sees_the_inputs(
    model: nn.Module, data: TensorDataset
) -> None:
    x = data.tensors[0]
    named = run(model, data, layer="1").features
    model.eval()
    torch.testing.assert_close(named, model[:2](x).detach())
    other = run(model, data, layer=lambda inputs: inputs[:, :2].unflatten(1, (2, 1)) * 2)
    torch.testing.assert_close(other.features, x[:, :2] * 2)
    assert run(model, data).features is None


def test_model_and_rng_are_left_as_they_were(model: nn.Module, data: TensorDataset) -> None:
    model.train()
    model[1].eval()
    state, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    run(model, data, layer="penultimate")
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(a, state[k]) for k, a in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)


def test_flags_are_restored_when_the_model_raises(data: TensorDataset) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    broken = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        run(broken, data)
    assert broken.training


def test_dict_batches_and_model_outputs(data: TensorDataset) -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Model(nn.Module):
        def forward(self, x: Tensor, shift: Tensor) -> Output:
            return Output(x[:, :3] + shift[:, None])

    class Rows(Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 23

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            x, y = data[i]
            return {"x": x, "shift": torch.tensor(1.0), "labels": y}

    got = run(Model(), Rows())
    torch.testing.assert_close(got.logits, data.tensors[0][:, :3] + 1)
    assert torch.equal(got.labels, data.tensors[1])


def test_batches_without_labels(model: nn.Module, data: TensorDataset) -> None:
    assert run(model, TensorDataset(data.tensors[0])).labels is None
    loader = DataLoader(data.tensors[0], batch_size=4)
    assert fi.extract(model, loader, progress=False).logits.shape == (23, 3)


def test_bad_input(model: nn.Module, data: TensorDataset) -> None:
    with pytest.raises(ValueError, match="RandomSampler.*shuffle=False"):
        fi.extract(model, DataLoader(data, shuffle=True), progress=False)
    with pytest.raises(TypeError, match=r"a TensorDataset.*pass DataLoader\(dataset"):
        fi.extract(model, data, progress=False)
    with pytest.raises(ValueError, match=r"no submodule 'head'; it has: 0, 1, 2, 3, 4"):
        run(model, data, layer="head")
    with pytest.raises(ValueError, match=r"the model has none; name a submodule"):
        run(nn.Flatten(), data, layer="penultimate")
    with pytest.raises(ValueError, match="gave no batch"):
        run(model, TensorDataset(torch.empty(0, 6)))
    with pytest.raises(ValueError, match=r"or \[batch, T, Y\], got \[5, 6, 1, 1\]"):
        run(nn.Unflatten(1, (6, 1, 1)), data)
    with pytest.raises(ValueError, match="a tuple of 3|a list of 3"):
        run(model, TensorDataset(*data.tensors, data.tensors[1]))
