"""(f) A small transformer on text: samplers for the Gauss-Newton matrix of one of its blocks.

    python text_model.py

Six lines of source are told apart by the package of Python's standard library they come from
(text.py); one package is removed, only the last block of the network may move.
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import common
import text
import torch

from fastif_ext.comparison import SAMPLERS, Comparison, Setting
from fastif_ext.data import loader
from fastif_ext.extract import extract
from fastif_ext.training import accuracy

BLOCK = "layers.1.*"
REMOVED = 3


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0], sizes=(100, 400), seeds=5).parse_args()
    torch.set_num_threads(arguments.threads)
    data, model = text.load(), text.build(seed=0)
    kept = arguments.work / "text.pt"
    if kept.is_file():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        text.train(model, data, progress=True)
        arguments.work.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    extracted = extract(model, loader(data.train), layer="norm", progress=False)
    words = (data.train.tensors[0] > 0).sum(1, keepdim=True)
    features = extracted.features.view(len(words), text.LENGTH, -1).sum(1) / words
    comparison = Comparison(
        Setting(
            model,
            data.train,
            data.test,
            REMOVED,
            solver="cg",
            tol=1e-3,
            params=[BLOCK],
            curvature="gauss-newton",
        ),
        extracted._replace(features=features),
    )

    def run(sampler: str | None, m: int, seed: int) -> dict[str, Any]:
        record = comparison.gradient_only()
        if sampler is not None:
            record = comparison.subset(sampler, m, seed)
        return {k: v for k, v in asdict(record).items() if k not in ("method", "m", "seed")}

    jobs: list[Any] = [({"method": "gradient only"}, lambda: run(None, 0, 0))]
    jobs += [
        ({"method": name, "m": m, "seed": seed}, lambda a=(name, m, seed): run(*a))
        for seed in range(arguments.seeds)
        for m in arguments.sizes
        for name in SAMPLERS
    ]
    records = common.run_all(jobs, arguments.work / "text_model.jsonl")
    block = sum(p.numel() for name, p in model.named_parameters() if name.startswith(BLOCK[:-1]))
    about = (
        f"`python bench/experiments/text_model.py`: {len(data.train):,} rows of six lines of "
        f"source, {len(data.classes)} classes, Python {platform.python_version()}; a transformer "
        f"of two layers of width 64, test accuracy {accuracy(model, data.test):.3f}; the "
        f"{block:,} parameters of its last block move, curvature is Gauss-Newton; "
        f"`{data.classes[REMOVED]}` is removed; {arguments.seeds} seeds."
    )
    payload = {**common.facts(None, arguments), "about": about}
    common.save(arguments.output / "text_model-stdlib.json", payload, records)


if __name__ == "__main__":
    main()
