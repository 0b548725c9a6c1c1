"""The networks: sizes, seeds, and loading of weights."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from fastif_ext import datasets, models

SHAPES = {"mlp": (64,), "cnn": (1, 28, 28), "alexnet": (1, 28, 28), "vgg11": (3, 32, 32)}
SIZES = {"mlp": 2_410, "cnn": 89_802, "alexnet": 3_868_170, "vgg11": 9_231_114}


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", models.NAMES)
def test_shape_and_size(name: str) -> None:
    model = models.build(name)
    assert size(model) == SIZES[name]
    model.eval()
    logits = model(torch.randn(3, *SHAPES[name]))
    assert logits.shape == (3, 10)
    assert logits.std() > 0


def test_cnn_head() -> None:
    model = models.build("cnn")
    assert size(model.get_submodule("head")) == 66_250


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seed_and_dtype(name: str, dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    one, same, other = (models.build(name, seed=s, dtype=dtype) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = (nn.utils.parameters_to_vector(m.parameters()) for m in (one, same, other))
    assert a.dtype == dtype
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_build_ignores_the_state_of_the_global_generator() -> None:
    first = models.build("mlp", seed=5)[0].weight
    torch.rand(7)
    assert torch.equal(models.build("mlp", seed=5)[0].weight, first)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="'resnet' is no model; use one of mlp, cnn"):
        models.build("resnet")
    with pytest.raises(ValueError, match="'imagenet' is no data set"):
        models.default_model("imagenet")


def test_every_data_set_has_a_model() -> None:
    assert {models.default_model(name) for name in datasets.NAMES} == set(models.NAMES)
    assert models.default_model("mnist:/somewhere") == "alexnet"


def test_default_model_takes_the_digits() -> None:
    x = datasets.load("digits").test.tensors[0]
    model = models.build(models.default_model("digits"), dtype=x.dtype)
    assert model(x).shape == (450, 10)


def test_load_weights_casts(tmp_path: Path) -> None:
    source = models.build("cnn", seed=1)
    torch.save({k: v.half() for k, v in source.state_dict().items()}, tmp_path / "w.pt")
    model = models.build("cnn", seed=2, dtype=torch.float64)
    assert models.load_weights(model, tmp_path / "w.pt") is model
    for p, q in zip(model.parameters(), source.parameters(), strict=True):
        assert p.dtype == torch.float64
        assert p.requires_grad
        assert torch.equal(p, q.half().double())


def test_load_weights_restores_buffers(tmp_path: Path) -> None:
    source = nn.Sequential(nn.BatchNorm1d(4))
    source(torch.randn(9, 4))
    torch.save(source.state_dict(), tmp_path / "w.pt")
    model = models.load_weights(nn.Sequential(nn.BatchNorm1d(4)), str(tmp_path / "w.pt"))
    assert torch.equal(model[0].running_mean, source[0].running_mean)
    assert int(model[0].num_batches_tracked) == 1


def test_load_weights_mismatch(tmp_path: Path) -> None:
    state = models.build("mlp", seed=1).state_dict()
    state["4.bias"] = state.pop("2.bias")
    state["0.bias"] = torch.zeros(31)
    torch.save(state, tmp_path / "w.pt")
    model = models.build("mlp")
    before = nn.utils.parameters_to_vector(model.parameters()).clone()
    with pytest.raises(ValueError, match="does not fit the model") as error:
        models.load_weights(model, tmp_path / "w.pt")
    for part in (
        "w.pt",
        "missing 2.bias",
        "unexpected 4.bias",
        r"0.bias is (31,), the model's (32",
    ):
        assert part in str(error.value)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)


class Evil:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_load_weights_runs_nothing(tmp_path: Path, how: str) -> None:
    trap, path = tmp_path / "ran", tmp_path / "w.pt"
    if how == "torch":
        torch.save({"0.weight": Evil(trap)}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(trap)))
    with pytest.raises(ValueError, match="not a file of weights"):
        models.load_weights(models.build("mlp"), path)
    assert not trap.exists()
    if how == "torch":  # the trap works where it is let
        torch.load(path, weights_only=False)
        assert trap.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut off"])
def test_load_weights_of_no_such_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.pt"
    with pytest.raises(FileNotFoundError, match=r"no file .*w\.pt"):
        models.load_weights(models.build("mlp"), path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.pt is not a file of weights"):
        models.load_weights(models.build("mlp"), path)


def test_load_weights_of_something_else(tmp_path: Path) -> None:
    torch.save([torch.zeros(3)], tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds a list, not a state_dict"):
        models.load_weights(models.build("mlp"), tmp_path / "w.pt")
