"""The whole job: from a trained model to the influence of every training row on some test rows.

    pip install captum "pydvl[influence]" dattri
    make bench ARGS="-k influence"           # digits
    make bench ARGS="-k influence --long"    # and a CNN on Fashion-MNIST

All take the Hessian on the same rows, drawn at random because peers take no weights, with the same
damping, and make scores that are right to 1 % (relative error against solutions with a residual of
1e-8): each gets its loosest tolerance, or fewest iterations, that does; finding it is not timed.
captum has none, it makes the whole matrix. Peers are called in their best form: pyDVL solves once
and goes through the training rows in batches of 512; dattri, which solves anew for every batch,
gets batches as large as their gradients have room for in a quarter of a gigabyte.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from bench_lissa import cnn, logistic, mlp
from cases import relative_error
from rounds import Job
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fastif_ext as fi

TESTS, ERROR = 8, 1e-2
BATCH, GRADIENTS = 512, 1 << 26
MODELS = {  # model, rows of the Hessian, training rows scored
    "digits logistic": (logistic, 400, 1347),
    "digits MLP": (mlp, 400, 1347),
    "Fashion-MNIST CNN": (cnn, 100, 4096),
}
TOLERANCES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 1e-5, 1e-6)


@dataclass
class Problem:
    """Whose influence on what is asked for."""

    model: nn.Module
    train: TensorDataset
    test: TensorDataset
    subset: fi.RandomSampler
    damping: float
    want: Tensor
    settings: dict[str, float] = field(default_factory=dict)

    def rows(self) -> TensorDataset:
        """The rows that the Hessian is taken on."""
        rows = self.subset.indices.to(self.train.tensors[0].device)
        return TensorDataset(*(t[rows] for t in self.train.tensors))

    def error(self, scores: Tensor) -> float:
        return relative_error(scores.detach(), self.want)

    def loosest(self, name: str, run: Callable[[float], Tensor], tried: Sequence[float]) -> Tensor:
        """Scores by the first setting, from loose to tight, that makes them right."""
        if name not in self.settings:
            low, high = 0, len(tried) - 1
            while low < high:
                middle = (low + high) // 2
                right = self.error(run(tried[middle])) <= ERROR
                low, high = (low, middle) if right else (middle + 1, high)
            self.settings[name] = tried[low]
        return run(self.settings[name])


@pytest.fixture(scope="module")
def problems(request: pytest.FixtureRequest, device: str) -> Callable[[str], Problem]:
    scale = request.config.getoption("--scale")
    made: dict[str, Problem] = {}

    def get(name: str) -> Problem:
        if name not in made:
            made[name] = _problem(name, scale, device)
        return made[name]

    return get


def _problem(name: str, scale: float, device: str) -> Problem:
    make, m, n = MODELS[name]
    n = max(16, int(scale * n))
    model, train, test = make()
    model.to(device).eval()
    train = TensorDataset(*(t[:n].to(device) for t in train.tensors))
    test = TensorDataset(*(t[:TESTS].to(device) for t in test.tensors))
    subset = fi.RandomSampler(len(train), min(m, len(train)), seed=0)
    some = TensorDataset(*(t[subset.indices.to(device)] for t in train.tensors))
    g = fi.mean_gradient(model, cross_entropy, test)
    damping = fi.cg(fi.Hessian(model, cross_entropy, some), g, damping="auto").damping
    exact = model.double()
    want = fi.influence_scores(
        exact, cross_entropy, _double(train), _double(test), sampler=subset, damping=damping,
        tol=1e-8,
    )  # fmt: skip
    model.to(train.tensors[0].dtype)
    return Problem(model, train, test, subset, damping, want)


def _double(data: TensorDataset) -> TensorDataset:
    return TensorDataset(data.tensors[0].double(), data.tensors[1])


def fastif(p: Problem) -> Tensor:
    def run(tol: float) -> Tensor:
        return fi.influence_scores(
            p.model,
            cross_entropy,
            p.train,
            p.test,
            sampler=p.subset,
            damping=p.damping,
            tol=tol,
        )

    return p.loosest("fastif_ext", run, TOLERANCES)


def captum(p: Problem) -> Tensor:
    library = pytest.importorskip("captum.influence")
    size = sum(q.numel() for q in p.model.parameters())
    if size > 5000:
        pytest.skip("captum: makes the whole Hessian")
    m = len(p.subset)
    influence = library.NaiveInfluenceFunction(
        p.model,
        p.train,
        checkpoint="",
        checkpoints_load_func=lambda model, path: 1.0,
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        batch_size=BATCH,
        hessian_dataset=p.rows(),
        hessian_reg=m * p.damping,  # its Hessian is a sum
        projection_dim=size,
    )
    return m * influence.influence(p.test.tensors)


def pydvl(p: Problem) -> Tensor:
    library = pytest.importorskip("pydvl.influence.torch")

    def run(rtol: float) -> Tensor:
        model = library.CgInfluence(
            p.model,
            cross_entropy,
            regularization=p.damping,
            rtol=rtol,
            atol=0.0,
            solve_simultaneously=True,
        ).fit(DataLoader(p.rows(), batch_size=len(p.subset)))
        factors = model.influence_factors(*p.test.tensors)
        pairs = zip(*(t.split(BATCH) for t in p.train.tensors), strict=True)
        return torch.cat([model.influences_from_factors(factors, x, y) for x, y in pairs], 1)

    return p.loosest("pyDVL", run, TOLERANCES)


def dattri(p: Problem) -> Tensor:
    library = pytest.importorskip("dattri.algorithm.influence_function")
    task = pytest.importorskip("dattri.task")
    size = sum(q.numel() for q in p.model.parameters())

    def loss(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        x, y = data
        return cross_entropy(functional_call(p.model, params, (x,)), y)

    def run(steps: float) -> Tensor:
        attributor = library.IFAttributorCG(
            task.AttributionTask(loss, p.model, p.model.state_dict()),
            device=str(p.train.tensors[0].device),
            max_iter=int(steps),
            regularization=p.damping,
        )
        attributor.cache(DataLoader(p.rows(), batch_size=len(p.subset)))
        batches = DataLoader(p.train, batch_size=min(len(p.train), GRADIENTS // size))
        return attributor.attribute(batches, DataLoader(p.test, batch_size=TESTS)).T

    return p.loosest("dattri", run, range(1, 64))


LIBRARIES = {"fastif_ext": fastif, "captum": captum, "pyDVL": pydvl, "dattri": dattri}
NAMES = [pytest.param(name, marks=[pytest.mark.long] if "CNN" in name else []) for name in MODELS]


def scoring(p: Problem) -> Job:
    def error(scores: Tensor) -> float:
        found = p.error(scores)
        if not found <= ERROR:
            pytest.skip(f"scores have a relative error of {found:.1e}, not {ERROR:.0e}")
        return found

    calls = {name: lambda run=run: run(p) for name, run in LIBRARIES.items()}
    return Job(calls, error=error)


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("model", NAMES)
def test_influence(name, model, problems, compare) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare(name, f"influence scores {model} R={TESTS}", lambda: scoring(problems(model)))
