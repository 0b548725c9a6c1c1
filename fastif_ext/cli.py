"""The command line: ``fastif-ext demo | remove-class | diagnose | info``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fastif_ext import datasets, models
from fastif_ext.build import build_info
from fastif_ext.device import DEVICES, choose_device
from fastif_ext.distributed import Ranks, SharedPasses, launch
from fastif_ext.passes import HERE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2: bad input, 1: the job failed)."""
    arguments = parser().parse_args(argv)
    try:
        _refuse_ranks(arguments)
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"{_who()}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"{_who()}: {error}", file=sys.stderr)
        return 1


def _who() -> str:
    """The program, and which rank of several it is: all of them tell of an error."""
    return f"fastif-ext, rank {os.environ['RANK']}" if launch.size() > 1 else "fastif-ext"


def _refuse_ranks(arguments: argparse.Namespace) -> None:
    if launch.size() > 1 and arguments.run is not _remove_class:
        raise ValueError("only remove-class works under torchrun; run this command without it")


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    from fastif_ext.comparison import SAMPLERS

    top = argparse.ArgumentParser(
        prog="fastif-ext",
        description="Influence functions on representative subsets: forget a class, "
        "compare samplers.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="compare all samplers in class removal on scikit-learn's digits",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--output", type=Path, default=Path("demo"), help="folder for JSON and PNG")
    demo.add_argument("--class", type=int, default=3, dest="class_index", help="digit to forget")
    demo.add_argument("--samples", type=int, nargs="+", default=None, help="subset sizes")
    demo.add_argument("--seeds", type=int, default=None, help="draws per sampler and size")
    demo.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=None, help="which")
    _add_device(demo)
    demo.add_argument("--quiet", action="store_true", help="no progress bar")
    demo.set_defaults(run=_demo)

    remove = commands.add_parser(
        "remove-class",
        help="train or load a model, and make it forget one class",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_problem(remove)
    remove.add_argument(
        "--solver",
        choices=("cg", "lissa", "exact"),
        default=argparse.SUPPRESS,
        help="iHVP; by default cg, with the paper's protocol lissa",
    )
    remove.add_argument("--tol", type=float, default=1e-3, help="relative residual of the solve")
    remove.add_argument("--protocol", choices=("default", "paper"), default="default", help="step")
    remove.add_argument("--save", type=Path, default=None, help="write the edited state_dict here")
    remove.set_defaults(run=_remove_class)

    diagnose = commands.add_parser(
        "diagnose",
        help="look for the known failures of influence with a sampler, and what helps",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_problem(diagnose)
    diagnose.add_argument("--seeds", type=int, default=3, help="subsets to draw")
    diagnose.set_defaults(run=_diagnose)

    info = commands.add_parser("info", help="what was built, and what it runs on")
    info.set_defaults(run=_info)
    return top


def _add_problem(command: argparse.ArgumentParser) -> None:
    """The options that name data, model, class and subset."""
    from fastif_ext.comparison import SAMPLERS

    add = command.add_argument
    add("--data", required=True, help="digits | fashion-mnist[:DIR] | mnist:DIR | cifar10:DIR")
    add("--class", type=int, required=True, dest="class_index", help="its number")
    add("--sampler", choices=SAMPLERS, default="curvature", help="of the subset")
    add("--samples", type=int, default=400, help="subset size m")
    add("--model", default=None, help="mlp | cnn | alexnet | vgg11")
    add("--weights", type=Path, default=None, help="state_dict; default: train")
    add("--epochs", type=int, default=2, help="when training")
    add("--params", nargs="+", default=None, help="names or patterns; default all")
    add("--damping", type=_number_or_auto, default="auto", help="number or auto")
    add("--seed", type=int, default=0, help="of training and sampling")
    _add_device(command)
    add("--json", type=Path, default=None, help="write the report here")
    add("--quiet", action="store_true", help="no progress bars")


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="where to train and solve; auto: CUDA, with a GPU and a CUDA build of fastif_ext",
    )


def _demo(arguments: argparse.Namespace) -> int:
    from fastif_ext import demo

    given = {
        "sizes": arguments.samples,
        "seeds": arguments.seeds,
        "samplers": arguments.samplers,
    }
    demo.run(
        arguments.output,
        class_index=arguments.class_index,
        device=choose_device(arguments.device),
        progress=not arguments.quiet,
        **{name: value for name, value in given.items() if value is not None},
    )
    return 0


def _check_outputs(*paths: Path | None) -> None:
    """Before hours of work: there is a folder for each file."""
    for path in paths:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            what = "is a folder" if path.is_dir() else "is in a folder that does not exist"
            raise ValueError(f"{path} {what}; give the name of a file in an existing folder")


def _problem(arguments: argparse.Namespace) -> tuple[datasets.LoadedData, nn.Module]:
    """The data, on the CPU, and the model loaded or trained on it, on the device asked for."""
    from fastif_ext.data import to_device
    from fastif_ext.training import train, train_lbfgs

    device = choose_device(arguments.device)
    data = datasets.load(arguments.data)
    if not 0 <= arguments.class_index < len(data.classes):
        raise ValueError(
            f"--class must be between 0 and {len(data.classes) - 1} for {data.name}, got "
            f"{arguments.class_index}"
        )
    name = arguments.model or models.default_model(data.name)
    model = models.build(name, seed=arguments.seed, dtype=data.train.tensors[0].dtype).to(device)
    if arguments.weights is not None:
        return data, models.load_weights(model, arguments.weights)
    print(f"Training {name} on {len(data.train)} rows of {data.name} on {device} ...", flush=True)
    if data.name == "digits":
        train_lbfgs(model, *to_device(data.train.tensors, device), l2=1e-3)
    else:
        progress = not arguments.quiet
        train(model, data.train, epochs=arguments.epochs, seed=arguments.seed, progress=progress)
    return data, model


def _remove_class(arguments: argparse.Namespace) -> int:
    with launch.started(choose_device(arguments.device)) as ranks:
        return _remove_class_on(ranks, arguments)


def _remove_class_on(ranks: Ranks | None, arguments: argparse.Namespace) -> int:
    from fastif_ext.comparison import make_sampler
    from fastif_ext.data import loader
    from fastif_ext.removal import remove_class

    _check_outputs(arguments.save, arguments.json)
    first = ranks is None or ranks.rank == 0
    arguments.quiet |= not first
    progress = not arguments.quiet
    passes = HERE if ranks is None else SharedPasses(ranks)
    with passes.together("training"):
        data, model = _problem(arguments)
    if ranks is not None:
        launch.share_model(model, ranks)
    extracted = passes.extract(model, loader(data.train), layer="penultimate", progress=progress)
    sampler = make_sampler(arguments.sampler, extracted, arguments.samples, seed=arguments.seed)
    report = remove_class(
        model,
        data.train,
        arguments.class_index,
        test=data.test,
        sampler=sampler,
        protocol=arguments.protocol,
        params=arguments.params,
        damping=arguments.damping,
        tol=arguments.tol,
        passes=passes,
        progress=progress,
        **{"solver": arguments.solver} if "solver" in arguments else {},
    )
    print(
        f"\nForgot class {arguments.class_index} ({data.classes[arguments.class_index]}) ", end=""
    )
    print(f"with {sampler}, protocol {arguments.protocol}:")
    print(report.summary())
    if arguments.save is not None and first:
        torch.save(report.model.state_dict(), arguments.save)
        print(f"Written: {arguments.save}")
    if arguments.json is not None and first:
        arguments.json.write_text(json.dumps(report.to_dict(), indent=1))
        print(f"Written: {arguments.json}")
    return 0 if report.target_reached else 1


def _diagnose(arguments: argparse.Namespace) -> int:
    from fastif_ext.comparison import make_sampler
    from fastif_ext.diagnosis import diagnose

    _check_outputs(arguments.json)
    data, model = _problem(arguments)
    found = diagnose(
        model,
        nn.functional.cross_entropy,
        data.train,
        (data.train.tensors[1] == arguments.class_index).nonzero().flatten(),
        lambda extracted, seed: make_sampler(
            arguments.sampler, extracted, arguments.samples, seed=arguments.seed + seed
        ),
        seeds=arguments.seeds,
        params=arguments.params,
        damping=arguments.damping,
    )
    print(found.summary())
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found.to_dict(), indent=1))
        print(f"Written: {arguments.json}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    for key, value in build_info().items():
        print(f"{key}: {value}")
    print(f"torch: {torch.__version__}")
    print(f"device: {choose_device('auto')}")
    return 0


def _number_or_auto(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or 'auto', got {text!r}") from None
