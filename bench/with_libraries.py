"""The samplers with the libraries people already have: captum, pyDVL, a DataLoader of one's own.

    pip install captum "pydvl[influence]"
    python bench/with_libraries.py

These libraries take a data set for their Hessian and no weights, but the rows that a
CurvatureSampler draws are worth nothing without theirs. A weight can travel with its row, in the
target, and the loss multiplies by it; a row of weight 1 is as it was. The three functions below
show it. `main` compares their results with those on all training rows, for random and for
curvature samples of one size, and for the latter with the weights forgotten.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fastif_ext as fi
from fastif_ext import datasets
from fastif_ext.training import train_lbfgs

DAMPING = 0.1  # added to the mean Hessian


class WithWeights(Dataset[tuple[Tensor, Tensor]]):
    """Some rows of a data set, in order, their targets (label, weight): what a loader can carry."""

    def __init__(self, data: Dataset, rows: Tensor, weights: Tensor) -> None:
        self.data, self.rows, self.weights = data, rows.tolist(), weights

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.data[self.rows[i]]
        return x, torch.stack([torch.as_tensor(y), self.weights[i]])


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy times weight, for targets [b, 2] of (label, weight)."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction  # "none" or "mean"; captum reads it

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        label, weight = targets.unbind(-1)
        losses = F.cross_entropy(logits, label.long(), reduction="none") * weight
        return losses.mean() if self.reduction == "mean" else losses


class Problem(NamedTuple):
    """A trained model and the rows whose influence on each other is asked for."""

    model: nn.Module
    train: TensorDataset
    test: TensorDataset


def with_captum(problem: Problem, sampler: fi.SubsetSampler, *, arnoldi: int = 0) -> Tensor:
    """Scores [n_test, n_train] of captum.influence, its `hessian_dataset` drawn by the sampler.

    captum's Hessian is the sum over `hessian_dataset`. With `sampler.weights`, which add up to
    about 1, the sum is the mean Hessian, and `hessian_reg` the damping in its units. Without
    weights, the sum over m rows needs `hessian_reg = m * damping`, and scores come out 1/m too
    small. `arnoldi` takes ArnoldiInfluenceFunction with a Krylov space of that size; by default it
    is NaiveInfluenceFunction, which makes the whole matrix.
    """
    from captum.influence import NaiveInfluenceFunction
    from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction

    size = sum(p.numel() for p in problem.model.parameters())
    options = {"projection_dim": arnoldi, "arnoldi_dim": arnoldi, "arnoldi_tol": 1e-8}
    method = ArnoldiInfluenceFunction if arnoldi else NaiveInfluenceFunction
    influence = method(
        problem.model,
        _ones(problem.train),
        checkpoint="",
        checkpoints_load_func=lambda model, path: 1.0,  # the model is trained already
        loss_fn=WeightedCrossEntropy("none"),
        batch_size=512,
        hessian_dataset=WithWeights(problem.train, sampler.indices, sampler.weights),
        hessian_reg=DAMPING,
        **(options if arnoldi else {"projection_dim": size}),
    )
    return influence.influence(_tensors(_ones(problem.test)))


def with_pydvl(
    problem: Problem, sampler: fi.SubsetSampler, *, batch_size: int | None = None
) -> Tensor:
    """Scores [n_test, n_train] of pyDVL, its `fit(loader)` given the sampler's rows.

    pyDVL averages batches, whatever their size, and the loss averages within each: so the weights
    are `m * sampler.weights`, about 1 in the mean, and batch_size (by default m) must divide m.
    `DataLoader(train, sampler=sampler)` is no substitute: the weights are lost, and LissaInfluence
    makes a loader of its own from `.dataset` and `.batch_size`, which takes all training rows.
    """
    from pydvl.influence.torch import CgInfluence

    m = len(sampler)
    batch_size = batch_size or m
    if m % batch_size:
        raise ValueError(f"batch_size = {batch_size} does not divide the {m} rows of the sample")
    subset = WithWeights(problem.train, sampler.indices, m * sampler.weights)
    influence = CgInfluence(
        problem.model,
        WeightedCrossEntropy("mean"),
        regularization=DAMPING,
        rtol=1e-8,
        solve_simultaneously=True,
    ).fit(DataLoader(subset, batch_size=batch_size))
    return influence.influences(*_tensors(_ones(problem.test)), *_tensors(_ones(problem.train)))


def with_loader(problem: Problem, sampler: fi.SubsetSampler, *, batch_size: int = 64) -> Tensor:
    """H_S g for the gradient g of each test row, [n_test, p]: curvature code of one's own.

    The loader gives the rows in the sampler's order, so its weights can be cut alike.
    """
    params = list(problem.model.parameters())

    def gradient(loss: Tensor, graph: bool = False) -> Tensor:
        parts = torch.autograd.grad(loss, params, create_graph=graph, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    x, y = problem.test.tensors
    vectors = torch.stack([gradient(loss) for loss in _losses(problem.model, x, y)])
    total = torch.zeros_like(vectors)
    loader = DataLoader(problem.train, batch_size=batch_size, sampler=sampler)
    for (x, y), w in zip(loader, sampler.weights.split(batch_size), strict=True):
        slope = gradient((_losses(problem.model, x, y) * w).sum(), graph=True)
        total += torch.stack([gradient(slope @ v) for v in vectors])
    return total


def exact_scores(problem: Problem, sampler: fi.SubsetSampler) -> Tensor:
    """g_test^T (H_S + damping)^-1 g_train by fastif_ext and dense algebra: what all should give."""
    x, y = problem.train.tensors
    rows = sampler.indices
    H = fi.Hessian(problem.model, F.cross_entropy, (x[rows], y[rows]), weights=sampler.weights)
    test, train = (
        torch.stack([_gradient(problem.model, *row) for row in zip(*part.tensors, strict=True)])
        for part in (problem.test, problem.train)
    )
    return fi.exact(H, test, damping=DAMPING).x @ train.T


def problem(n_train: int = 1347, n_test: int = 20) -> Problem:
    """An MLP 64-16-10 (1210 parameters) at a minimum on scikit-learn's digits, float64."""
    data = datasets.load("digits")
    train, test = (
        TensorDataset(*(t[:n] for t in part.tensors))
        for part, n in ((data.train, n_train), (data.test, n_test))
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    train_lbfgs(model, *train.tensors, l2=1e-3)
    return Problem(model, train, test)


class Agreement(NamedTuple):
    """How an estimate compares with the same quantity on all rows."""

    correlation: float
    error: float
    """Norm of the difference over the norm of the latter."""


def agreement(estimate: Tensor, full: Tensor) -> Agreement:
    """Correlation over all entries, and relative error."""
    both = torch.stack([estimate.flatten(), full.flatten()])
    return Agreement(
        float(torch.corrcoef(both)[0, 1]), float((estimate - full).norm() / full.norm())
    )


def samplers(problem: Problem, m: int, seed: int) -> dict[str, fi.SubsetSampler]:
    """Random and curvature samples of m rows, and the latter with its weights forgotten."""
    with torch.no_grad():
        logits = problem.model(problem.train.tensors[0])
    curvature = fi.CurvatureSampler(logits, m, method="systematic", seed=seed)
    return {
        "random": fi.RandomSampler(len(logits), m, seed=seed),
        "curvature": curvature,
        "curvature, weights forgotten": fi.SubsetSampler(len(logits), curvature.indices),
    }


Estimate = Callable[[Problem, fi.SubsetSampler], Tensor]


def compare(problem: Problem, estimate: Estimate, m: int, seeds: int) -> dict[str, Agreement]:
    """Mean agreement over the seeds of an estimate from m rows with that from all rows."""
    full = estimate(problem, fi.AllRows(len(problem.train)))
    found: dict[str, list[Agreement]] = {}
    for seed in range(seeds):
        for name, sampler in samplers(problem, m, seed).items():
            found.setdefault(name, []).append(agreement(estimate(problem, sampler), full))
    return {name: Agreement(*torch.tensor(all_).mean(0).tolist()) for name, all_ in found.items()}


def installed(library: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(library) is not None


def _ones(data: TensorDataset) -> WithWeights:
    """All rows of a data set with weight 1."""
    n = len(data)
    return WithWeights(data, torch.arange(n), torch.ones(n))


def _tensors(data: Dataset) -> tuple[Tensor, Tensor]:
    """A whole data set as one batch."""
    return torch.utils.data.default_collate([data[i] for i in range(len(data))])


def _losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    parts = torch.autograd.grad(_losses(model, x[None], y[None]).sum(), list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=200, help="m, the rows of the subset")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    mlp = problem()

    cases: dict[str, tuple[str, Estimate]] = {
        "captum NaiveInfluenceFunction": ("captum", with_captum),
        "captum ArnoldiInfluenceFunction": ("captum", partial(with_captum, arnoldi=100)),
        "pyDVL CgInfluence": ("pydvl", with_pydvl),
        "a plain DataLoader, H_S g": ("torch", with_loader),
    }
    print(f"m = {args.samples} of {len(mlp.train)} rows, {args.seeds} seeds, damping {DAMPING}\n")
    print("| library | subset | correlation | relative error |\n|---|---|---|---|")
    for title, (library, estimate) in cases.items():
        if not installed(library):
            print(f"| {title} | not installed: pip install captum 'pydvl[influence]' | | |")
            continue
        for name, got in compare(mlp, estimate, args.samples, args.seeds).items():
            print(f"| {title} | {name} | {got.correlation:.4f} | {got.error:.3f} |", flush=True)


if __name__ == "__main__":
    main()
