"""Small networks of many kinds, each with a loss and data, and every example's gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DOUBLE = torch.float64
N, T = 23, 7


class Conv(nn.Module):
    """Strides, padding of two kinds, dilation, in-place ReLU, batch norm and dropout between."""

    def __init__(self, affine: bool = False) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 3, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(3, affine=affine)
        self.relu = nn.ReLU(inplace=True)
        self.b = nn.Conv2d(3, 2, 2, padding="same", padding_mode="circular", dilation=2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(18, 3)
        self.norm.running_mean.uniform_(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.a(x)))
        return self.head(self.drop(self.relu(self.b(x))).flatten(1))


class Tied(nn.Module):
    """One weight in two layers; one of the layers called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))


class Loose(nn.Module):
    """A layer's weight used outside of it: what hooks cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(x @ self.layer.weight))


class Residual(nn.Module):
    """Convolutions in groups and group norm around a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 4, 3, padding="same", padding_mode="reflect")
        self.norm = nn.GroupNorm(2, 4)
        self.b = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.again = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        for norm in (self.norm, self.again):
            nn.init.normal_(norm.weight)
        self.again.running_mean.uniform_(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).relu_()
        return self.head(self.again(x + self.b(x)).relu().mean((2, 3)))


class Text(nn.Module):
    """Tables, one with a row for padding, attention, norms over one axis and over two."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(7, 4, padding_idx=2), nn.Embedding(9, 4)
        self.first = nn.LayerNorm((5, 4))
        self.mix = nn.Linear(4, 12)
        self.second = nn.RMSNorm(4)
        self.head = nn.Linear(4, 3)
        nn.init.normal_(self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])[None]  # broadcast
        x = self.first(input=self.table(input=x) + self.places(places))
        q, k, v = self.mix(x).chunk(3, -1)
        return self.head(self.second(x + F.scaled_dot_product_attention(q, k, v)).mean(1))


class Tokens(nn.Module):
    """Embedding, attention and layer norm around linear layers on sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


class Signal(nn.Module):
    """Convolutions along one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2)
        self.b = nn.Conv1d(4, 4, 2, padding="same", padding_mode="circular", groups=2)
        self.c = nn.Conv1d(4, 2, 3, padding=1, padding_mode="reflect", bias=False)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(torch.tanh(self.b(torch.tanh(self.a(x))))).tanh().mean(2))


class Language(nn.Module):
    """The next word's logits; places are looked up once, words go out by the table they came by."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(7, 4), nn.Embedding(6, 4)
        self.first, self.mix, self.drop = nn.LayerNorm(4), nn.Linear(4, 12), nn.Dropout(0.1)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.table(x) + self.places(torch.arange(x.shape[1])))
        q, k, v = self.mix(self.first(x)).chunk(3, -1)
        return self.head(x + F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Patches(nn.Module):
    """A class token and places of no layer, attention of PyTorch's own, a scale for all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 4, 3, stride=3)
        self.token, self.places = (
            nn.Parameter(torch.randn(1, 1, 4)),
            nn.Parameter(torch.randn(5, 4)),
        )
        self.attention, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        x = x + self.scale * self.attention(self.norm(x), x, x, need_weights=False)[0]
        return self.head(x[:, 0])


class Frames(nn.Module):
    """Pictures of a film as rows of the batch, which layers with channels see."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.group = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.GroupNorm(2, 2)
        self.b, self.mix = nn.Conv1d(2, 2, 1), nn.Linear(2, 3)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        x = self.group(torch.tanh(self.norm(self.a(x.flatten(0, 1)))))
        x = self.mix(torch.tanh(self.b(x.flatten(2))).mean(2))
        return torch.tanh(x).view(n, -1, 3).mean(1)


class Asking(nn.Module):
    """A parameter of no layer, and a look at the inputs that decides what is done."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(3, 3), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(x + self.shift) if x.abs().max() < 1e9 else x)


def next_words(outputs: Tensor, words: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), words.flatten())


def case(name: str) -> tuple[nn.Module, Callable[..., Tensor], Tensor, Tensor]:
    torch.manual_seed(3)
    n = N + T
    x, y = torch.randn(n, 3, dtype=DOUBLE), torch.randint(3, (n,))
    loss: Callable[..., Tensor] = F.cross_entropy
    if name == "softmax":
        model: nn.Module = nn.Linear(3, 3)
    elif name == "mlp":
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    elif name == "regression":
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))
        loss, y = F.mse_loss, torch.randn(n, 2, dtype=DOUBLE)
    elif name.startswith("conv"):
        model, x = Conv(affine=name != "conv"), torch.randn(n, 1, 6, 6, dtype=DOUBLE)
    elif name == "chain":
        again = nn.Conv2d(2, 2, 3, padding=1)
        below, above = nn.Conv2d(1, 2, 3, stride=2, padding=2, dilation=2), nn.Linear(18, 3)
        model = nn.Sequential(
            below, nn.ReLU(inplace=True), again, nn.Tanh(), again, nn.Flatten(), above
        )
        loss, x = nn.CrossEntropyLoss(label_smoothing=0.1), torch.randn(n, 1, 6, 6, dtype=DOUBLE)
    elif name == "normalized":
        model = nn.Sequential(
            nn.BatchNorm2d(1),
            nn.Conv2d(1, 2, 3),
            nn.BatchNorm2d(2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.BatchNorm1d(8),
            nn.Linear(8, 3),
        )
        for i in (0, 2, 6):
            nn.init.normal_(model[i].weight)
            model[i].running_mean.uniform_(-1, 1)
        x = torch.randn(n, 1, 6, 6, dtype=DOUBLE)
    elif name == "residual":
        model, x = Residual(), torch.randn(n, 1, 6, 6, dtype=DOUBLE)
    elif name == "tied":
        model = Tied()
    elif name == "loose":
        model = Loose()
    elif name == "signal":
        model, x = Signal(), torch.randn(n, 2, 9, dtype=DOUBLE)
    elif name == "language":
        x = torch.randint(7, (n, 6))
        model, loss, x, y = Language(), next_words, x[:, :5], x[:, 1:]
    elif name == "patches":
        model, x = Patches(), torch.randn(n, 1, 6, 6, dtype=DOUBLE)
    elif name == "frames":
        model, x = Frames(), torch.randn(n, 2, 1, 4, 4, dtype=DOUBLE)
        loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    elif name == "asking":
        model = Asking()
    else:
        model, x = Tokens() if name == "tokens" else Text(), torch.randint(7, (n, 5))
    return model.double().train(), loss, x, y


CASES = [
    "softmax",
    "mlp",
    "regression",
    "conv",
    "conv-affine",
    "chain",
    "normalized",
    "residual",
    "text",
    "signal",
    "tied",
    "loose",
    "tokens",
    "language",
    "patches",
    "frames",
    "asking",
]
OUTSIDE = {
    "tokens": ["layer.self_attn.*"],
    "language": [],
    "patches": ["token", "places", "scale", "attention.*"],
    "frames": [],
}
"""Networks that whole batches do not go through layer by layer: parameters outside of layers."""


def gradients(model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Each example's gradient, [n, p]."""
    model = copy.deepcopy(model).eval()
    torch.backends.mha.set_fastpath_enabled(False)
    rows = []
    for i in range(len(y)):
        grads = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), model.parameters())
        rows.append(torch.cat([g.flatten() for g in grads]))
    torch.backends.mha.set_fastpath_enabled(True)
    return torch.stack(rows)


def split(x: Tensor, y: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (x[:N], y[:N]), (x[N:], y[N:])
