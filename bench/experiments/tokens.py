"""(h) A language model: samplers of tokens for the Gauss-Newton matrix of one of its blocks.

    python tokens.py

A small causal transformer predicts the next of 2000 words of source text (text.py). Rows are
tokens: samplers read the sequences in one pass, and the matrix is taken with TokenModel on the
tokens they drew. Only the last block may move; what lies below it is a constant and run once. The
reference is the matrix of all tokens, taken a sequence at a time.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import common
import text
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import trange

import fastif_ext as fi
from fastif_ext.data import take

LENGTH = 32  # words of a sequence that are predicted
SEQUENCES = 384  # of the reference
WIDTH = 64
DAMPING = 0.02  # of the largest eigenvalue of the reference
TOL = 1e-2  # of the iHVP on a subset, whose error is far larger
DIRECTIONS = 4  # for the error of G_S v
SAMPLERS = ("random", "logit, by label", "logit", "curvature", "curvature-systematic")


class LanguageModel(nn.Module):
    """Word and position vectors, causal layers, logits [b, T, 2000] of the next word."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(text.WORDS, WIDTH)
        nn.init.normal_(self.words.weight, std=0.1)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.ModuleList(text.Layer(WIDTH, 4) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, text.WORDS)

    def below(self, ids: Tensor) -> Tensor:
        """What goes into the last block."""
        x = self.words(ids) + self.positions
        for layer in self.layers[:-1]:
            x = layer(x, causal(ids.shape[1]))
        return x

    def forward(self, ids: Tensor) -> Tensor:
        return Top(self)(self.below(ids))


class Top(nn.Module):
    """The last block and what follows it."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.block, self.norm, self.head = model.layers[-1], model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(x, causal(x.shape[1]))))


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def sequences(data: TensorDataset) -> TensorDataset:
    """The rows of at least 33 words: 32 of them, and the 32 that follow each."""
    ids = data.tensors[0]
    ids = ids[(ids != 0).sum(1) > LENGTH]
    return TensorDataset(ids[:, :LENGTH], ids[:, 1 : LENGTH + 1])


def train(model: LanguageModel, data: TensorDataset, *, epochs: int = 8) -> None:
    draw = torch.Generator().manual_seed(0)
    ids, labels = data.tensors
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in trange(epochs, desc="training", unit="epoch"):
        for rows in torch.randperm(len(ids), generator=draw).split(32):
            optimiser.zero_grad()
            loss = cross_entropy(model(ids[rows]).flatten(0, 1), labels[rows].flatten())
            loss.backward()
            optimiser.step()
    model.eval()


def trained(work: Any, data: TensorDataset) -> LanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LanguageModel()
        kept = work / "tokens.pt"
        if kept.is_file():
            model.load_state_dict(torch.load(kept, weights_only=True))
        else:
            train(model, data)
            work.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), kept)
    return model.eval()


def mean_loss_hessian(outputs: Tensor, targets: Tensor, z: Tensor) -> Tensor:
    """Of the mean cross-entropy over the tokens of a sequence, in its logits, times z."""
    p = outputs.softmax(-1)
    return (p * z - p * (p * z).sum(-1, keepdim=True)) / outputs.shape[1]


def draw(name: str, top: nn.Module, loader: DataLoader[Any], m: int, seed: int) -> Any:
    quiet: dict[str, Any] = {"seed": seed, "progress": False}
    labels = loader.dataset.tensors[1].flatten()  # type: ignore[attr-defined]
    frequent = labels.bincount().argsort(descending=True, stable=True)[:m]
    if name == "random":  # counted by their labels alone
        return fi.RandomSampler(len(labels), m, seed=seed)
    if name == "logit":  # a row for each of the m most frequent words, of all rows
        return fi.LogitSampler.from_loader(top, loader, 1, classes=frequent, **quiet)
    if name == "logit, by label":  # of the rows where that word follows
        return fi.LogitSampler.from_loader(top, loader, 1, classes=frequent, by_label=True, **quiet)
    method = "systematic" if name == "curvature-systematic" else "bottom-k"
    return fi.CurvatureSampler.from_loader(top, loader, m, method=method, **quiet)


class Reference:
    """The Gauss-Newton matrix of all tokens, and the gradient of the test loss solved with it."""

    def __init__(self, top: nn.Module, train: TensorDataset, test: TensorDataset) -> None:
        self.top, self.train = top, train
        self.rows = fi.TokenRows(train)
        self.loader: DataLoader[Any] = DataLoader(train, batch_size=64)

        def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
            return cross_entropy(outputs.flatten(0, 1), targets.flatten())

        options: dict[str, Any] = {"params": ["block.*"]}
        self.matrix = fi.GaussNewton(
            top,
            train,
            loss_fn=mean_loss,
            output_hessian=mean_loss_hessian,
            chunk_size=32,
            **options,
        )
        self.gradient = fi.mean_gradient(top, mean_loss, test, **options)
        generator = torch.Generator().manual_seed(1)
        self.v = torch.randn(DIRECTIONS, self.matrix.dim, generator=generator)
        self.product = self.matrix @ self.v
        x = self.v[0]
        for _ in range(8):  # power iteration; a rough value will do
            x = self.matrix @ (x / x.norm())
        self.damping = DAMPING * float(x.norm())
        self.solution = fi.cg(self.matrix, self.gradient, damping=self.damping, tol=1e-3).x

    def compare(self, name: str, m: int, seed: int) -> dict[str, Any]:
        sampler = draw(name, self.top, self.loader, m, seed)
        matrix = fi.GaussNewton(
            fi.TokenModel(self.top),
            take(self.rows, sampler.indices),
            weights=sampler.weights,
            params=["model.block.*"],
            chunk_size=100,
        )
        product = matrix @ self.v
        solved = fi.cg(matrix, self.gradient, damping=self.damping, tol=TOL)
        return {
            "hvp_error": relative(product, self.product),
            "ihvp_error": relative(solved.x, self.solution),
            "iterations": solved.iterations,
        }


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0], sizes=(100, 400), seeds=5).parse_args()
    torch.set_num_threads(arguments.threads)
    data = text.load()
    everything, test = sequences(data.train), sequences(data.test)
    model = trained(arguments.work, everything)
    top = Top(model)

    @torch.no_grad()
    def lower(part: TensorDataset) -> TensorDataset:
        return TensorDataset(model.below(part.tensors[0]), part.tensors[1])

    with torch.no_grad():
        logits = model(test.tensors[0]).flatten(0, 1)
    test_loss = float(cross_entropy(logits, test.tensors[1].flatten()))
    part = lower(TensorDataset(*(t[:SEQUENCES] for t in everything.tensors)))
    reference: list[Reference] = []

    def run(name: str, m: int, seed: int) -> dict[str, Any]:
        if not reference:  # what is in the log needs none
            reference.append(Reference(top, part, lower(test)))
        return reference[0].compare(name, m, seed)

    jobs: list[tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = [
        ({"method": name, "m": m, "seed": seed}, lambda a=(name, m, seed): run(*a))
        for seed in range(arguments.seeds)
        for m in arguments.sizes
        for name in SAMPLERS
    ]
    records = common.run_all(jobs, arguments.work / "tokens.jsonl", arguments.first)
    occurring = len(part.tensors[1].unique())
    loader: Any = DataLoader(part, batch_size=64)
    sizes = fi.curvature_sizes(fi.extract(top, loader, progress=False).logits)
    about = (
        f"`python bench/experiments/tokens.py`: the next of {text.WORDS:,} words, Python "
        f"{platform.python_version()}'s source text; a causal transformer of two layers of width "
        f"{WIDTH}, trained on {len(everything):,} sequences of {LENGTH} words, test loss "
        f"{test_loss:.2f} (uniform: {torch.tensor(text.WORDS).log():.2f}); the "
        f"{sum(p.numel() for p in top.block.parameters()):,} parameters of its last block, against "
        f"the Gauss-Newton matrix of {len(part) * LENGTH:,} tokens of {SEQUENCES} sequences, in "
        f"which {occurring:,} words occur; damping {DAMPING:g} of its largest eigenvalue; the "
        f"right-hand side is the gradient of the test loss; {arguments.seeds} seeds. The sizes "
        f"1 - sum p^2 of the tokens have mean {sizes.mean():.2f} and standard deviation "
        f"{sizes.std():.2f}."
    )
    payload = {**common.facts(None, arguments), "about": about, "test_loss": test_loss}
    common.save(arguments.output / "tokens-stdlib.json", payload, records)


if __name__ == "__main__":
    main()
