"""The small networks of the examples and experiments, built from a seed."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

_VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")


def build(name: str, *, seed: int = 0, dtype: torch.dtype | None = None) -> nn.Module:
    """Build an untrained network, in train mode, on the CPU.

    =========== ================ ============ ====================================================
    name        inputs           parameters   layers
    =========== ================ ============ ====================================================
    "mlp"       [n, 64]               2,410   64-32-10, tanh; for digits
    "cnn"       [n, 1, 28, 28]       89,802   three strided convolutions, then a ``head`` 1024-64-10
                                              of 66,250 parameters; for Fashion-MNIST
    "alexnet"   [n, 1, 28, 28]    3,868,170   AlexNet for 28 x 28: five convolutions, three linear
                                              layers, dropout; for MNIST
    "vgg11"     [n, 3, 32, 32]    9,231,114   VGG11 with BatchNorm, one linear layer; for CIFAR-10
    =========== ================ ============ ====================================================

    In "cnn" and "alexnet" the convolutions are the module ``features``, the linear layers ``head``:
    ``params=["head.*"]`` selects the latter. All end in logits [n, 10]. The same seed gives the
    same weights, and torch's global random state is left as it was.

    Args:
        name: one of the above.
        seed: of the initial weights.
        dtype: of the parameters; by default torch's default dtype.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> import torch
        >>> from fastif_ext import models
        >>> model = models.build("mlp", seed=1, dtype=torch.float64)
        >>> model(torch.zeros(3, 64, dtype=torch.float64)).shape
        torch.Size([3, 10])
    """
    if name not in _BUILDERS:
        raise ValueError(f"name = {name!r} is no model; use one of {', '.join(NAMES)}")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return _BUILDERS[name]().to(dtype)


def default_model(data_name: str) -> str:
    """The model that goes with a data set of ``fastif_ext.datasets``.

    Args:
        data_name: the data set's name, a folder after a colon being ignored.

    Raises:
        ValueError: an unknown data set.

    Example:
        >>> from fastif_ext import models
        >>> models.default_model("cifar10:/data")
        'vgg11'
    """
    name = data_name.partition(":")[0]
    if name not in _DEFAULTS:
        raise ValueError(f"data_name = {data_name!r} is no data set; use {', '.join(_DEFAULTS)}")
    return _DEFAULTS[name]


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a state_dict that ``torch.save`` wrote into a model, cast to the model's dtype.

    The file is read with ``weights_only=True``: it can hold tensors, and run nothing. On an error
    the model stays as it was.

    Args:
        model: the model, whose parameters and buffers are overwritten.
        path: the file.

    Returns:
        The model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a state_dict, or names or shapes differ from the model's.

    Example:
        >>> import os, tempfile, torch
        >>> from fastif_ext import models
        >>> path = os.path.join(tempfile.mkdtemp(), "mlp.pt")
        >>> torch.save(models.build("mlp", seed=1).state_dict(), path)
        >>> model = models.load_weights(models.build("mlp", seed=2), path)
        >>> torch.equal(model[0].weight, models.build("mlp", seed=1)[0].weight)
        True
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {path}; name one that torch.save wrote")
    advice = "save one with torch.save(model.state_dict(), path)"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's restricted reader raises KeyError and more on other files
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is not a file of weights ({reason}); {advice}") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state_dict; {advice}")
    own = model.state_dict()
    problems = [
        *(f"missing {k}" for k in own if k not in state),
        *(f"unexpected {k}" for k in state if k not in own),
        *(
            f"{k} is {tuple(state[k].shape)}, the model's {tuple(v.shape)}"
            for k, v in own.items()
            if k in state and state[k].shape != v.shape
        ),
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit the model ({'; '.join(problems)}): build the model that these "
            f"weights were saved from"
        )
    model.load_state_dict(state)
    return model


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def _cnn() -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
    )
    head = nn.Sequential(nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(OrderedDict(features=features, head=head))


def _alexnet() -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(128, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Flatten(),
    )
    head = nn.Sequential(
        nn.Dropout(),
        nn.Linear(256 * 3 * 3, 1024),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(1024, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )
    return nn.Sequential(OrderedDict(features=features, head=head))


def _vgg11() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for width in _VGG11:
        if isinstance(width, int):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(512, 10))


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "alexnet": _alexnet,
    "vgg11": _vgg11,
}
_DEFAULTS = {"digits": "mlp", "fashion-mnist": "cnn", "mnist": "alexnet", "cifar10": "vgg11"}
NAMES = tuple(_BUILDERS)
