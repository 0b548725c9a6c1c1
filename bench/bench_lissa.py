"""Inverse-Hessian-vector products: LiSSA and CG against what users would install instead.

    pip install "pydvl[influence]" dattri curvlinops-for-pytorch
    make bench ARGS="-k ihvp"           # digits
    make bench ARGS="-k ihvp --long"    # and a CNN on Fashion-MNIST

Every solver gets the same model, subset of rows, damping and right-hand sides, and works to the
same true residual |b - (H + damping) x| / |b| on every right-hand side. It is measured after the
run by one operator for all: who does not reach it is not timed, and says so. Peers that have no
tolerance are told the fewest iterations that reach it; where a peer's tolerance means something
else, it gets the loosest one that does. Finding these is not timed. LiSSA's scale is given to the
peers and to our plain recursion; our accelerated LiSSA looks at the spectrum itself, on the clock.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from rounds import Call, Job
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fastif_ext as fi
from fastif_ext import datasets, models
from fastif_ext.training import train, train_lbfgs

RIGHT_HAND_SIDES = 8
TOL = 1e-3
SLACK = 1.5  # a residual this many times TOL still counts as reached


Trained = tuple[nn.Module, TensorDataset, TensorDataset]
"""A model, its training and its test data."""


@dataclass
class System:
    """(H + damping I) x = b on a subset."""

    model: nn.Module
    x: Tensor
    y: Tensor
    b: Tensor
    damping: float
    scale: float
    iterations: dict[str, int]
    settings: dict[str, float] = field(default_factory=dict)

    def operator(self) -> fi.Hessian:
        return fi.Hessian(self.model, cross_entropy, (self.x, self.y))

    def residual(self, solution: Tensor) -> float:
        r = self.b - self.operator() @ solution - self.damping * solution
        return float((r.norm(dim=1) / self.b.norm(dim=1)).max())

    def loosest(self, name: str, solve: Callable[[float], Tensor]) -> float:
        """The largest tolerance with which a solver comes to the residual; TOL if none does."""
        if name not in self.settings:
            tried = [TOL * factor for factor in (100, 50, 20, 10, 5, 2, 1.5)]
            fitting = (t for t in tried if self.residual(solve(t).detach()) <= SLACK * TOL)
            self.settings[name] = next(fitting, TOL)
        return self.settings[name]

    def fewest(self, name: str, solve: Callable[[int], Tensor], start: int) -> int:
        """The fewest iterations from `start` on with which a solver comes to the residual."""
        if name not in self.settings:
            tried = range(start, start + 10)
            fitting = (k for k in tried if self.residual(solve(k).detach()) <= SLACK * TOL)
            self.settings[name] = next(fitting, start)
        return int(self.settings[name])


def logistic() -> Trained:
    data = datasets.load("digits")
    torch.manual_seed(0)
    model = nn.Linear(64, 10, dtype=torch.float64)
    train_lbfgs(model, *data.train.tensors, l2=1e-3)
    return model, data.train, data.test


def mlp() -> Trained:
    data = datasets.load("digits")
    model = models.build("mlp", seed=0, dtype=torch.float64)
    train_lbfgs(model, *data.train.tensors, l2=1e-3)
    return model, data.train, data.test


def cnn() -> Trained:
    try:
        data = datasets.load("fashion-mnist")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model = models.build("cnn", seed=0)
    train(model, data.train, epochs=1)
    return model, data.train, data.test


MODELS = {
    "digits logistic": (logistic, 400),
    "digits MLP": (mlp, 400),
    "Fashion-MNIST CNN": (cnn, 100),
}


@pytest.fixture(scope="module")
def systems(device: str) -> Callable[[str], System]:
    made: dict[str, System] = {}

    def get(name: str) -> System:
        if name not in made:
            made[name] = _system(name, device)
        return made[name]

    return get


def _system(name: str, device: str) -> System:
    make, count = MODELS[name]
    model, train_set, test_set = make()
    model.to(device).eval()
    g = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(train_set), generator=g)[:count]
    x, y = (t[rows].to(device) for t in train_set.tensors)
    b = []
    for i in range(RIGHT_HAND_SIDES):
        loss = cross_entropy(
            model(test_set.tensors[0][i : i + 1].to(device)),
            test_set.tensors[1][i : i + 1].to(device),
        )
        b.append(nn.utils.parameters_to_vector(torch.autograd.grad(loss, [*model.parameters()])))
    system = System(model, x, y, torch.stack(b), 0.0, 0.0, {})
    found = fi.lissa(
        system.operator(), system.b, damping="auto", tol=TOL, max_iter=20_000, acceleration=None
    )
    system.damping, system.scale = found.damping, found.scale
    system.iterations["lissa"] = found.iterations
    system.iterations["cg from b"] = _steps_of_cg_from_b(system)
    return system


def _steps_of_cg_from_b(s: System) -> int:
    """Steps to the residual of conjugate gradients, one by one, that begin at x = b."""
    H, x, steps = s.operator(), s.b.clone(), 0
    r = s.b - H @ x - s.damping * x
    d, rs = r.clone(), r.square().sum(1, keepdim=True)
    while (rs.sqrt() > SLACK * TOL * s.b.norm(dim=1, keepdim=True)).any():
        product = H @ d + s.damping * d
        alpha = rs / (d * product).sum(1, keepdim=True)
        x, r = x + alpha * d, r - alpha * product
        new = r.square().sum(1, keepdim=True)
        d, rs, steps = r + new / rs * d, new, steps + 1
    return steps


def lissa(s: System) -> Tensor:
    return fi.lissa(s.operator(), s.b, damping=s.damping, tol=TOL).x


def plain_lissa(s: System) -> Tensor:
    return fi.lissa(s.operator(), s.b, damping=s.damping, scale=s.scale, tol=TOL, max_iter=20_000).x


def cg(s: System) -> Tensor:
    return fi.cg(s.operator(), s.b, damping=s.damping, tol=TOL).x


def plain_cg(s: System) -> Tensor:
    return fi.cg(s.operator(), s.b, damping=s.damping, tol=TOL, preconditioner=None).x


def _pydvl(s: System):
    operator = pytest.importorskip("pydvl.influence.torch.operator")
    batch = pytest.importorskip("pydvl.influence.torch.batch_operation")
    loader = DataLoader(TensorDataset(s.x, s.y), batch_size=len(s.x))
    return operator, batch.HessianBatchOperation(s.model, cross_entropy), loader


def pydvl_lissa(s: System) -> Tensor:
    operator, product, loader = _pydvl(s)
    solver = operator.LissaOperator(
        product,
        loader,
        regularization=s.damping,
        maxiter=s.iterations["lissa"],
        scale=s.scale,
        rtol=0.0,
        warn_on_max_iteration=False,
    )
    return solver.apply(s.b)


def pydvl_cg(s: System) -> Tensor:
    operator, _, loader = _pydvl(s)

    def solve(rtol: float) -> Tensor:
        solver = operator.CgOperator(
            operator.HessianOperator(s.model, cross_entropy, loader),
            regularization=s.damping,
            rtol=rtol,
            atol=0.0,
            use_block_cg=True,
        )
        return solver.apply(s.b)

    # its residual is compared with rtol^2 |b|, not with the square of rtol |b|
    return solve(s.loosest("pydvl cg", solve))


def _dattri_loss(s: System) -> tuple[Callable[..., Tensor], Tensor]:
    names = [n for n, _ in s.model.named_parameters()]
    shapes = [p.shape for p in s.model.parameters()]
    sizes = [p.numel() for p in s.model.parameters()]
    flat = nn.utils.parameters_to_vector(s.model.parameters()).detach()

    def loss(theta: Tensor, x: Tensor = s.x, y: Tensor = s.y) -> Tensor:
        parts = [t.view(shape) for t, shape in zip(theta.split(sizes), shapes, strict=True)]
        return cross_entropy(
            functional_call(s.model, dict(zip(names, parts, strict=True)), (x,)), y
        )

    return loss, flat


def _dattri_cg(mode: str) -> Callable[[System], Tensor]:
    def run(s: System) -> Tensor:
        hessian = pytest.importorskip("dattri.func.hessian")
        loss, flat = _dattri_loss(s)

        def solve(steps: int) -> Tensor:
            inverse = hessian.ihvp_at_x_cg(
                loss, flat, max_iter=steps, regularization=s.damping, mode=mode
            )
            return inverse(s.b.clone())

        # Its tolerance is not used: it starts from b and makes as many steps as it is told.
        return solve(s.fewest(f"dattri {mode}", solve, s.iterations["cg from b"]))

    return run


def dattri_lissa(s: System) -> Tensor:
    hessian = pytest.importorskip("dattri.func.hessian")
    loss, flat = _dattri_loss(s)
    solve = hessian.ihvp_lissa(
        lambda theta, x, y: loss(theta, x, y.long()),  # integer arguments raise
        batch_size=len(s.x),
        num_repeat=1,
        recursion_depth=s.iterations["lissa"],
        damping=s.damping / s.scale,
        scaling=s.scale,
    )
    return solve((flat, s.x, s.y.to(s.x.dtype)), s.b, in_dims=(None, 0, 0))


def curvlinops_cg(s: System) -> Tensor:
    curvlinops = pytest.importorskip("curvlinops")
    parameters = [*s.model.parameters()]
    H = curvlinops.HessianLinearOperator(
        s.model,
        nn.CrossEntropyLoss(),
        parameters,
        [(s.x, s.y)],
        check_deterministic=False,
    )
    identity = pytest.importorskip("curvlinops.examples").IdentityLinearOperator(
        [p.shape for p in parameters], s.x.device, s.x.dtype
    )

    def solve(tolerance: float) -> Tensor:
        inverse = curvlinops.CGInverseLinearOperator(
            H + s.damping * identity,
            tolerance=tolerance,
            eps=0,
            max_iter=1000,
            max_tridiag_iter=0,
        )
        return (inverse @ s.b.T).T

    return solve(s.loosest("curvlinops cg", solve))


LISSA = {
    "fastif_ext": lissa,
    "fastif_ext, plain recursion": plain_lissa,
    "pyDVL": pydvl_lissa,
    "dattri": dattri_lissa,
}
CG = {
    "fastif_ext": cg,
    "fastif_ext, not preconditioned": plain_cg,
    "pyDVL block": pydvl_cg,
    "dattri": _dattri_cg("rev-rev"),
    "dattri rev-fwd": _dattri_cg("rev-fwd"),
    "curvlinops": curvlinops_cg,
}
NAMES = [pytest.param(name, marks=[pytest.mark.long] if "CNN" in name else []) for name in MODELS]


def solving(solvers: dict[str, Callable[[System], Tensor]], system: System) -> Job:
    def residual(solution: Tensor) -> float:
        found = system.residual(solution)
        if not found <= SLACK * TOL:
            pytest.skip(f"came to a residual of {found:.1e}, not {TOL:.0e}")
        return found

    calls: dict[str, Call] = {
        name: lambda solve=solve: solve(system).detach() for name, solve in solvers.items()
    }
    return Job(calls, error=residual)


@pytest.mark.parametrize("name", LISSA)
@pytest.mark.parametrize("model", NAMES)
def test_ihvp_lissa(name, model, systems, compare) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare(name, f"iHVP by LiSSA {model}", lambda: solving(LISSA, systems(model)))


@pytest.mark.parametrize("name", CG)
@pytest.mark.parametrize("model", NAMES)
def test_ihvp_cg(name, model, systems, compare) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare(name, f"iHVP by CG {model}", lambda: solving(CG, systems(model)))
