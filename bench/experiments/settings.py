"""The trained models that the experiments take classes out of.

=============== ================================== ===================== ==================
setting         data                               model                 parameters moved
=============== ================================== ===================== ==================
digits          scikit-learn's digits              MLP 64-32-10, tanh    all, 2,410
fashion-mnist   Fashion-MNIST, 60,000 rows         CNN, 89,802           its head, 66,250
mnist           MNIST, 60,000 rows                 AlexNet, 3,868,170    last layer, 5,130
cifar10         CIFAR-10, 50,000 rows              VGG11, 9,231,114      last layer, 5,130
=============== ================================== ===================== ==================

With ``whole=True`` all parameters move. Otherwise what lies below the moved layers is a constant,
so it is run once over the data and the moved layers become the model: the same numbers, far sooner.
Trained weights are kept in a work folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastif_ext import datasets, models
from fastif_ext.comparison import Setting
from fastif_ext.data import loader, take
from fastif_ext.extract import Extracted, extract
from fastif_ext.training import accuracy, train, train_lbfgs

NAMES = ("digits", "fashion-mnist", "mnist", "cifar10")
L2 = 1e-3  # weight decay of the digits' MLP and of retrained last layers
EPOCHS = {"fashion-mnist": 15, "mnist": 3, "cifar10": 30}
CLASS = {"digits": 3, "fashion-mnist": 3, "mnist": 3, "cifar10": 3}


@dataclass
class Case:
    """A setting with what the samplers look at and what removal should come to."""

    name: str
    model: nn.Module
    """The whole trained network; `setting` has the layers that move."""
    setting: Setting
    extracted: Extracted
    images: datasets.LoadedData
    retrain: Callable[[], nn.Module]
    """Trains the moved layers anew, from fresh weights, without the class."""
    facts: dict[str, object]


def load(
    name: str,
    *,
    work: Path,
    data: str | None = None,
    weights: Path | None = None,
    whole: bool = False,
    class_index: int | None = None,
    device: str = "cpu",
) -> Case:
    """Data, trained model and features of a setting.

    Args:
        name: one of NAMES.
        work: folder where trained weights are kept.
        data: what fastif_ext.datasets.load takes; by default the name.
        weights: a state_dict to use in place of training.
        whole: move all parameters.
        class_index: the class to remove.
        device: where to train and run; the data are moved there whole.
    """
    if name not in NAMES:
        raise SystemExit(f"unknown setting {name!r}; there are {', '.join(NAMES)}")
    removed = CLASS[name] if class_index is None else class_index
    images = datasets.load(data or name)
    images = replace(images, train=_on(device, images.train), test=_on(device, images.test))
    model = _trained(name, images, work, weights, device)
    facts = {
        "data": images.name,
        "train_rows": len(images.train),
        "test_rows": len(images.test),
        "class_index": removed,
        "class": images.classes[removed],
        "test_accuracy": accuracy(model, images.test),
    }
    train_set, test_set, moved = images.train, images.test, model
    if not whole and name != "digits":
        below, moved = _parts(name, model)
        train_set, test_set = (_features(below, s) for s in (images.train, images.test))
    facts["parameters"] = sum(p.numel() for p in moved.parameters())
    extracted = extract(moved, loader(train_set), layer="penultimate", progress=False)
    last = name in ("mnist", "cifar10") and not whole
    setting = Setting(
        moved,
        train_set,
        test_set,
        removed,
        solver="cg",
        tol=1e-3,
        curvature="linear-softmax" if last else "hessian",
    )

    def retrain() -> nn.Module:
        return _retrained(name, whole, train_set, removed)

    return Case(name, model, setting, extracted, images, retrain, facts)


def _on(device: str, data: TensorDataset) -> TensorDataset:
    return TensorDataset(*(t.to(device) for t in data.tensors))


def _trained(
    name: str, images: datasets.LoadedData, work: Path, weights: Path | None, device: str
) -> nn.Module:
    dtype = images.train.tensors[0].dtype
    model = models.build(models.default_model(name), seed=0, dtype=dtype).to(device)
    if weights is not None:
        return models.load_weights(model, weights)
    kept = work / f"{name}.pt"
    if kept.is_file():
        return models.load_weights(model, kept)
    print(f"training {name}", flush=True)
    if name == "digits":
        train_lbfgs(model, *images.train.tensors, l2=L2)
    else:
        train(model, images.train, epochs=EPOCHS[name], progress=True)
    work.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), kept)
    return model


def _parts(name: str, model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """What stays, and what moves, of a network."""
    if name == "fashion-mnist":
        return model.features, model.head
    if name == "mnist":
        return nn.Sequential(model.features, model.head[:-1]), model.head[-1]
    return model[:-1], model[-1]


def _features(below: nn.Module, data: TensorDataset) -> TensorDataset:
    """The rows as the moved layers see them; dropout is off, as in a trained network."""
    below.eval()
    with torch.no_grad():
        parts: list[Tensor] = [below(x) for x in data.tensors[0].split(1000)]
    return TensorDataset(torch.cat(parts).flatten(1), data.tensors[1])


def _retrained(name: str, whole: bool, data: TensorDataset, removed: int) -> nn.Module:
    kept = take(data, (data.tensors[1] != removed).nonzero().flatten())
    x, y = kept.tensors
    fresh = models.build(models.default_model(name), seed=0, dtype=x.dtype).to(x.device)
    if name == "digits":
        train_lbfgs(fresh, x, y, l2=L2)
        return fresh
    if whole:
        train(fresh, kept, epochs=EPOCHS[name])
        return fresh
    _, layers = _parts(name, fresh)
    train(layers, kept, epochs=5)
    return layers
