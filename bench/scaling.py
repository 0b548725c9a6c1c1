"""How the cost of each operator grows with each of its sizes.

    python bench/scaling.py --output bench/results --threads 1

One size at a time is doubled and the others stay. The slope of time against size on logarithmic
axes, over the upper half of the range where a call's fixed cost no longer counts, says how: 1 is
proportional. Sizes take turns, five rounds of them; the medians go to scaling.json and scaling.png.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from report import commit
from rounds import Job, measure

import fastif_ext as fi
from fastif_ext import models

Build = Callable[[int], Callable[[], Any]]


def doubling(first: int, count: int) -> list[int]:
    return [first << i for i in range(count)]


def class_multinomial(n: int = 20_000, Y: int = 10, k: int = 50) -> Callable[[], Any]:
    logits = 3 * torch.randn(n, Y)
    return lambda: fi.class_multinomial(logits, k, seed=0)


def curvature_multinomial(n: int = 20_000, Y: int = 10) -> Callable[[], Any]:
    logits = 3 * torch.randn(n, Y)
    return lambda: fi.curvature_multinomial(logits, 400, seed=0)


def kmeans_assign(n: int = 10_000, d: int = 64, K: int = 64) -> Callable[[], Any]:
    x, c = torch.randn(n, d), torch.randn(K, d)
    return lambda: fi.kmeans_assign(x, c)


def lissa_update(p: int = 100_000, R: int = 1) -> Callable[[], Any]:
    h, v, hvp = torch.zeros(R, p), torch.randn(R, p), [torch.randn(R, p)]
    return lambda: fi.lissa_update_(h, v, hvp, damping=0.1, scale=10.0)


def softmax_hvp(n: int = 10_000, C: int = 10, R: int = 1) -> Callable[[], Any]:
    p, z = torch.randn(n, C).softmax(1), torch.randn(R, n, C)
    return lambda: fi.softmax_hvp(p, z)


def linear_softmax_hvp(n: int = 10_000, d: int = 64, C: int = 10, R: int = 1) -> Callable[[], Any]:
    x, p, v = torch.randn(n, d), torch.randn(n, C).softmax(1), torch.randn(R, C, d)
    return lambda: fi.linear_softmax_hvp(x, p, v)


def hessian(rows: int = 400, R: int = 1) -> Callable[[], Any]:
    model = models.build("mlp", seed=0)
    data = torch.randn(rows, 64), torch.arange(rows) % 10
    H = fi.Hessian(model, torch.nn.functional.cross_entropy, data)
    v = torch.randn(R, H.dim)
    return lambda: H @ v


SWEEPS: list[tuple[str, str, Build, Sequence[int]]] = [
    ("class_multinomial", "n", lambda n: class_multinomial(n=n), doubling(8_000, 8)),
    ("class_multinomial", "Y", lambda Y: class_multinomial(Y=Y), doubling(4, 8)),
    ("class_multinomial", "k", lambda k: class_multinomial(k=k), doubling(8, 8)),
    ("curvature_multinomial", "n", lambda n: curvature_multinomial(n=n), doubling(8_000, 8)),
    ("curvature_multinomial", "Y", lambda Y: curvature_multinomial(Y=Y), doubling(4, 8)),
    ("kmeans_assign", "n", lambda n: kmeans_assign(n=n), doubling(1_000, 8)),
    ("kmeans_assign", "d", lambda d: kmeans_assign(d=d), doubling(8, 7)),
    ("kmeans_assign", "K", lambda K: kmeans_assign(K=K), doubling(8, 7)),
    ("lissa_update_", "p", lambda p: lissa_update(p=p), doubling(20_000, 9)),
    ("lissa_update_", "R", lambda R: lissa_update(R=R), doubling(1, 7)),
    ("softmax_hvp", "n", lambda n: softmax_hvp(n=n), doubling(2_000, 8)),
    ("softmax_hvp", "C", lambda C: softmax_hvp(C=C), doubling(4, 8)),
    ("softmax_hvp", "R", lambda R: softmax_hvp(R=R), doubling(1, 6)),
    ("linear_softmax_hvp", "n", lambda n: linear_softmax_hvp(n=n), doubling(1_000, 7)),
    ("linear_softmax_hvp", "C", lambda C: linear_softmax_hvp(C=C), doubling(4, 6)),
    ("linear_softmax_hvp", "R", lambda R: linear_softmax_hvp(R=R), doubling(1, 6)),
    ("Hessian @ v, MLP", "rows", lambda n: hessian(rows=n), doubling(100, 7)),
    ("Hessian @ v, MLP", "R", lambda R: hessian(R=R), doubling(1, 6)),
]


def sweep(build: Build, sizes: Sequence[int], budget: float) -> list[float]:
    """Median seconds at each size."""
    calls = {str(size): build(size) for size in sizes}
    found = measure(Job(calls), device="cpu", budget=budget)
    return [median(found[str(size)].seconds) for size in sizes]


def slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Of log time against log size, by least squares over the upper half."""
    upper = len(sizes) // 2
    x = [math.log(s) for s in sizes[upper:]]
    y = [math.log(t) for t in seconds[upper:]]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum(
        (a - mx) ** 2 for a in x
    )


def plot(curves: list[dict[str, Any]], path: Path) -> None:
    """One panel for each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(c["size"] for c in curves))
    figure, axes = plt.subplots(2, (len(names) + 1) // 2, figsize=(13, 7))
    for axis, name in zip(axes.flat, names, strict=False):
        for c in curves:
            if c["size"] == name:
                label = f"{c['operator']} ({c['slope']:.2f})"
                axis.loglog(c["sizes"], [1e3 * s for s in c["seconds"]], "o-", ms=3, label=label)
        axis.set(xlabel=name, ylabel="ms")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--seconds", type=float, default=2.0, help="of rounds, for each curve")
    arguments = p.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    curves = []
    for operator, name, build, sizes in SWEEPS:
        seconds = sweep(build, sizes, arguments.seconds)
        curves.append(
            {
                "operator": operator,
                "size": name,
                "sizes": list(sizes),
                "seconds": [float(f"{s:.4g}") for s in seconds],
                "slope": round(slope(sizes, seconds), 3),
            }
        )
        print(f"{operator:24} {name:5} slope {curves[-1]['slope']:.2f}", flush=True)
    facts = {"commit": commit(), "threads": arguments.threads, "torch": torch.__version__}
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "scaling.json"
    path.write_text(json.dumps({**facts, "curves": curves}, indent=1) + "\n")
    plot(curves, path.with_suffix(".png"))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
