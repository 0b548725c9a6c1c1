"""The whole job: a class out of Fashion-MNIST's CNN, from trained model to report.

    make bench ARGS="--long -k removal"

Retraining is what removal stands in for: fresh weights, all rows but the class's, the same number
of epochs. The predecessor's procedure (arXiv 2312.05586) is written in plain PyTorch as its readers
would: the class's mean gradient, LiSSA by double backward on random rows, then the direction added,
normalised, again and again while F1 is looked up on the test set. It is given the damping and the
scale that our solver found, on the same number of rows. The error is 1 - F1 on the test set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from rounds import Job
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

import fastif_ext as fi
from fastif_ext import datasets, models
from fastif_ext.training import train

CLASS, ROWS, EPOCHS = 3, 400, 10
STEPS, TOL = 100, 1e-3  # the predecessor's steps of |theta| / 200, and what LiSSA is to reach


@dataclass
class Trained:
    """The model that is to forget."""

    model: nn.Module
    train: TensorDataset
    test: TensorDataset
    epochs: int


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, device: str) -> Callable[[], Trained]:
    made: list[Trained] = []

    def get() -> Trained:
        if not made:
            made.append(_train(request.config.getoption("--scale"), device))
        return made[0]

    return get


def _train(scale: float, device: str) -> Trained:
    try:
        data = datasets.load("fashion-mnist")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    n = max(1000, int(scale * len(data.train)))
    train_set, test_set = (
        TensorDataset(*(t[:n].to(device) for t in part.tensors)) for part in (data.train, data.test)
    )
    model = models.build("cnn", seed=0).to(device)
    epochs = max(1, int(scale * EPOCHS))
    train(model, train_set, epochs=epochs)
    return Trained(model, train_set, test_set, epochs)


def retraining(t: Trained) -> nn.Module:
    kept = t.train.tensors[1] != CLASS
    fresh = models.build("cnn", seed=0).to(t.train.tensors[0].device)
    train(fresh, TensorDataset(*(x[kept] for x in t.train.tensors)), epochs=t.epochs)
    return fresh


def removal(t: Trained, solver: str) -> nn.Module:
    report = fi.remove_class(t.model, t.train, CLASS, test=t.test, samples=ROWS, solver=solver)
    return report.model


def predecessor(t: Trained, damping: float, scale: float) -> nn.Module:
    model = copy.deepcopy(t.model).eval()
    parameters = [*model.parameters()]
    rows = (t.train.tensors[1] == CLASS).nonzero().flatten()
    g = [torch.zeros_like(p) for p in parameters]
    for x, y in DataLoader(Subset(t.train, rows.tolist()), batch_size=512):
        loss = cross_entropy(model(x), y, reduction="sum") / len(rows)
        for total, part in zip(g, torch.autograd.grad(loss, parameters), strict=True):
            total += part
    some = torch.randperm(len(t.train), generator=torch.Generator().manual_seed(0))[:ROWS]
    x, y = (a[some.to(a.device)] for a in t.train.tensors)
    h = [part.clone() for part in g]
    size = torch.cat([part.flatten() for part in g]).norm()
    for _ in range(5000):
        loss = cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        inner = sum((a * b).sum() for a, b in zip(grads, h, strict=True))
        products = torch.autograd.grad(inner, parameters)
        new = [
            v + (1 - damping / scale) * a - b / scale
            for v, a, b in zip(g, h, products, strict=True)
        ]
        change = torch.cat([(a - b).flatten() for a, b in zip(new, h, strict=True)]).norm()
        h = new
        if change <= TOL * size:
            break
    direction = torch.cat([part.flatten() for part in h])
    theta = nn.utils.parameters_to_vector(parameters).detach()
    direction *= theta.norm() / 200 / direction.norm()
    best, best_f1 = theta, -1.0
    for step in range(1, STEPS + 1):
        moved = theta + step * direction
        nn.utils.vector_to_parameters(moved, parameters)
        f1 = _f1(model, t.test)
        if f1 > best_f1:
            best, best_f1 = moved, f1
    nn.utils.vector_to_parameters(best, parameters)
    return model


def _f1(model: nn.Module, test: TensorDataset) -> float:
    return float(fi.class_metrics(model, test, CLASS).f1)


def job(t: Trained) -> Job:
    g = fi.mean_gradient(
        t.model, cross_entropy, TensorDataset(*(x[:2000] for x in t.train.tensors))
    )
    some = torch.randperm(len(t.train), generator=torch.Generator().manual_seed(0))[:ROWS]
    data = tuple(x[some.to(x.device)] for x in t.train.tensors)
    H = fi.Hessian(t.model, cross_entropy, data)
    found = fi.lissa(H, g, damping="auto", tol=1e-1)
    assert found.scale is not None
    damping, scale = found.damping, float(found.scale)
    calls: dict[str, Callable[[], Any]] = {
        "fastif_ext": lambda: removal(t, "cg"),
        "fastif_ext, LiSSA": lambda: removal(t, "lissa"),
        "retraining": lambda: retraining(t),
        "predecessor's, plain PyTorch": lambda: predecessor(t, damping, scale),
    }
    return Job(calls, error=lambda model: 1 - _f1(model, t.test))


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["fastif_ext", "fastif_ext, LiSSA", "retraining", "predecessor's, plain PyTorch"]
)
def test_removal(name, trained, compare) -> None:
    compare(name, f"class removal, Fashion-MNIST CNN m={ROWS}", lambda: job(trained()))
