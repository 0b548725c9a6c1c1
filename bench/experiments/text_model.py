"""(f) A small transformer on text: samplers for the Gauss-Newton matrix of one of its blocks.

    python text_model.py

Six lines of source are told apart by the package of Python's standard library they come from
(text.py); one package is removed, only the last block of the network may move. What lies below it
is a constant, so it is run once and the rest of the network becomes the model. One direction does
not reach the target here: self-accuracy falls and then rises again, until everything is wrong. So
the way has two parts, the direction taken anew where the first one ends.
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import common
import text
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastif_ext.comparison import Comparison, Setting
from fastif_ext.data import loader
from fastif_ext.extract import extract
from fastif_ext.training import accuracy

SAMPLERS = ("random", "stratified", "logit", "curvature", "curvature-systematic")
REMOVED = 3


class Top(nn.Module):
    """The last block of the transformer and what follows it."""

    def __init__(self, model: text.Transformer) -> None:
        super().__init__()
        self.block, self.norm, self.head = model.layers[-1], model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        """Logits [b, Y] of what `below` gives, [b, T, width + 1]."""
        present = x[:, :, -1] > 0
        share = present / present.sum(1, keepdim=True).clamp(min=1)
        x = self.block(x[:, :, :-1], present[:, None, None, :])
        return self.head((self.norm(x) * share[:, :, None]).sum(1))


@torch.no_grad()
def below(model: text.Transformer, data: TensorDataset) -> TensorDataset:
    """What goes into the last block, and in one more column which words are present."""
    model.eval()
    parts = []
    for ids in data.tensors[0].split(500):
        present = ids != 0
        x = model.words(ids) + model.positions[: ids.shape[1]]
        for layer in model.layers[:-1]:
            x = layer(x, present[:, None, None, :])
        parts.append(torch.cat([x, present[:, :, None].to(x.dtype)], 2))
    return TensorDataset(torch.cat(parts), data.tensors[1])


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0], sizes=(100, 400), seeds=3).parse_args()
    torch.set_num_threads(arguments.threads)
    data, model = text.load(), text.build(seed=0)
    kept = arguments.work / "text.pt"
    if kept.is_file():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        text.train(model, data, progress=True)
        arguments.work.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    top = Top(model)
    train, test = below(model, data.train), below(model, data.test)
    comparison = Comparison(
        Setting(
            top,
            train,
            test,
            REMOVED,
            solver="cg",
            tol=1e-3,
            params=["block.*"],
            curvature="gauss-newton",
            linearisations=2,
        ),
        extract(top, loader(train), progress=False),
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
    records = common.run_all(jobs, arguments.work / "text_model.jsonl", arguments.first)
    block = sum(p.numel() for p in top.block.parameters())
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
