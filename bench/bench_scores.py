"""Influence scores once the systems are solved: products of solutions with training gradients.

Every way goes through the rows in passes of the size that is best for it, found beforehand.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from cases import relative_error
from rounds import Call, Job
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from fastif_ext import models
from fastif_ext.directional import DirectionalDerivatives, forward_mode
from fastif_ext.objective import WeightedLoss

WAYS = ("fastif_ext", "forward mode", "per-example gradients")
ROWS = {"mlp": 4096, "cnn": 512, "resnet": 128, "transformer": 256, "vit": 256}
RIGHT_HAND_SIDES = (1, 8, 32)
VOCABULARY, LENGTH = 1000, 32
Way = Callable[[Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Two convolutions with batch norm around a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(channels, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return (self.short(x) + self.path(x)).relu()


def resnet() -> nn.Module:
    """Three blocks for 32 x 32 images, 75,000 parameters."""
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Attention(nn.Module):
    """A transformer's layer, of width 64 with 4 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(64), nn.LayerNorm(64)
        self.mix, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.wide = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(self.first(x)).unflatten(-1, (3, 4, 16)).movedim(-3, 0).transpose(2, 3)
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.wide(self.second(x))


class Transformer(nn.Module):
    """Two layers on 32 words out of 1,000, 166,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, 64), nn.Embedding(LENGTH, 64)
        self.layers, self.head = nn.Sequential(Attention(), Attention()), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device).expand_as(x)
        return self.head(self.layers(self.words(x) + self.places(places)).mean(1))


class VisionTransformer(nn.Module):
    """Two of PyTorch's own layers on 16 patches, 114,000 parameters.

    34,000 are the class token, the places and attention's: of no layer that hooks see.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 64, 8, 8)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, 64))
        self.places = nn.Parameter(0.02 * torch.randn(1, 17, 64))
        layer = nn.TransformerEncoderLayer(
            64, 4, 256, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(64), enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.layers(x)[:, 0])


NETWORKS = {"resnet": resnet, "transformer": Transformer, "vit": VisionTransformer}


def build(network: str) -> nn.Module:
    """The same network each time, in eval mode."""
    if network in models.NAMES:
        return models.build(network, seed=0).eval()
    torch.manual_seed(0)
    return NETWORKS[network]().eval()


def inputs(network: str, n: int) -> Tensor:
    if network == "transformer":
        return torch.randint(VOCABULARY, (n, LENGTH))
    return torch.randn(n, *{"mlp": (64,), "cnn": (1, 28, 28)}.get(network, (3, 32, 32)))


def best_passes(way: Way, x: Tensor, y: Tensor) -> Call:
    """The way through all rows, in passes of the size that took the least time."""

    def through(size: int) -> Call:
        pairs = list(zip(x.split(size), y.split(size), strict=True))
        return lambda: torch.cat([way(a, b) for a, b in pairs], 1)

    def seconds(size: int) -> float:
        call = through(size)
        call()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    sizes = [size for size in (32, 64, 128, 256, 512, 1024, 4096) if size <= max(32, len(x))]
    return through(min(sizes, key=seconds))


def scores(network: str, n: int, count: int, device: str) -> Job:
    model = build(network).to(device)
    x, y = inputs(network, n).to(device), torch.randint(10, (n,), device=device)
    total = WeightedLoss(model, cross_entropy, (x, y))
    v = torch.randn(count, total.selection.dim, device=device)
    directions = total.selection.split(v)
    named = {k: p.detach() for k, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], xi: Tensor, yi: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, params, (xi[None],)), yi[None])

    def per_example_gradients(xs: Tensor, ys: Tensor) -> Tensor:
        g = vmap(grad(loss), (None, 0, 0))(named, xs, ys)
        return v @ torch.cat([t.flatten(1) for t in g.values()], 1).T

    ours = DirectionalDerivatives(total)
    size = ours.rows()

    def fastif() -> Tensor:
        pairs = zip(x.split(size), y.split(size), strict=True)
        return torch.cat([ours(a, b, directions) for a, b in pairs], 1)

    calls = {
        "fastif_ext": fastif,
        "forward mode": best_passes(lambda a, b: forward_mode(total, a, b, directions), x, y),
        "per-example gradients": best_passes(per_example_gradients, x, y),
    }
    few = 16
    some, labels = x[:few].cpu(), y[:few].cpu()
    some = some.double() if some.is_floating_point() else some
    exact = WeightedLoss(build(network).double(), cross_entropy, (some, labels))
    want = forward_mode(exact, some, labels, exact.selection.split(v.cpu().double()))
    return Job(calls, error=lambda got: relative_error(got[:, :few].cpu(), want))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("count", RIGHT_HAND_SIDES)
@pytest.mark.parametrize("network", ROWS)
def test_scores(name, network, count, device, rows, compare) -> None:
    n = rows(ROWS[network])
    case = f"scores {network} n={n} R={count}"
    compare(name, case, lambda: scores(network, n, count, device))
