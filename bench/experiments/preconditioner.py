"""Does a Jacobi preconditioner pay in conjugate gradients?

    python preconditioner.py

Iterations to a residual of 1e-3 on digits, for the influence of a class: without a preconditioner,
with the exact diagonal of the damped curvature, and with Hutchinson's estimate from 10 products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastif_ext as fi
from fastif_ext import datasets, models
from fastif_ext.data import loader, take
from fastif_ext.training import train_lbfgs


def iterations(A: Tensor, b: Tensor, diagonal: Tensor | None) -> int:
    """Of preconditioned conjugate gradients to a relative residual of 1e-3."""

    def apply(r: Tensor) -> Tensor:
        return r if diagonal is None else r / diagonal

    x, r = torch.zeros_like(b), b.clone()
    z = apply(r)
    d, rz, count = z.clone(), r @ z, 0
    while r.norm() > 1e-3 * b.norm():
        product = A @ d
        step = rz / (d @ product)
        x, r = x + step * d, r - step * product
        z = apply(r)
        new = r @ z
        d, rz, count = z + new / rz * d, new, count + 1
    return count


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0], sizes=(400,), seeds=1).parse_args()
    torch.set_num_threads(arguments.threads)
    train = datasets.load("digits").train
    nets: dict[str, nn.Module] = {
        "logistic regression": nn.Linear(64, 10).double(),
        "tanh MLP": models.build("mlp", seed=0, dtype=torch.float64),
    }
    records: list[dict[str, Any]] = []
    for name, model in nets.items():
        train_lbfgs(model, *train.tensors, l2=1e-3)
        rows = (train.tensors[1] == 3).nonzero().flatten()
        b = fi.mean_gradient(model, cross_entropy, take(train, rows))
        logits = fi.extract(model, loader(train), progress=False).logits
        sampler = fi.CurvatureSampler(logits, 400, method="systematic")
        data: Any = take(train, sampler.indices)
        make: dict[str, Callable[[], Any]] = {
            "Gauss-Newton": lambda m=model, d=data, w=sampler.weights: fi.GaussNewton(
                m, d, weights=w
            ),
            "Hessian": lambda m=model, d=data, w=sampler.weights: fi.Hessian(
                m, cross_entropy, d, weights=w
            ),
        }
        for curvature, operator in make.items():
            H = operator()
            A = torch.cat([H @ e for e in torch.eye(H.dim, dtype=H.dtype).split(256)])
            ends = torch.linalg.eigvalsh(A)
            signs = 2.0 * torch.randint(2, (10, H.dim), dtype=H.dtype) - 1
            guess = ((H @ signs) * signs).mean(0)
            for share in (0.1, 0.01, 0.001):
                damping = share * float(ends[-1])
                if ends[0] + damping <= 0:
                    continue
                damped = A + damping * torch.eye(H.dim, dtype=H.dtype)
                records.append(
                    {
                        "model": name,
                        "curvature": curvature,
                        "share": share,
                        "none": iterations(damped, b, None),
                        "jacobi": iterations(damped, b, A.diagonal().clamp(min=0) + damping),
                        "estimated": iterations(damped, b, guess.clamp(min=0) + damping),
                    }
                )
    path = arguments.output / "preconditioner-digits.json"
    common.save(path, common.facts(None, arguments), records)


if __name__ == "__main__":
    main()
