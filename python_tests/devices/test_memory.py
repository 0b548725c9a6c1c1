"""Memory that runs out, and memory that is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastif_ext as fi
from fastif_ext.device import choose_device, full_precision, memory_for
from fastif_ext.memory import peak_memory
from fastif_ext.training import train


class Greedy(nn.Linear):
    """A layer whose device has no memory for more than so many rows at a time.

    It asks for values, so that torch.func.vmap does not take it: rows would not be seen in shapes.
    """

    limit = 1 << 30

    def forward(self, x: Tensor) -> Tensor:
        assert x.isfinite().all()
        if x.shape[-2] > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
        return super().forward(x)


@pytest.fixture
def model() -> Greedy:
    return Greedy(3, 4)


@pytest.fixture
def data() -> TensorDataset:
    return TensorDataset(torch.randn(100, 3), torch.arange(100) % 4)


def refused(message: str) -> Any:
    return pytest.raises(torch.OutOfMemoryError, match=message)


def test_products(model: Greedy, data: TensorDataset) -> None:
    for make in (
        lambda: fi.Hessian(model, F.cross_entropy, data),
        lambda: fi.GaussNewton(model, data),
    ):
        model.limit = 1 << 30
        H = make()
        model.limit = 64
        with refused(
            r"product of 2 vector\(s\) of 16 parameters on a chunk of 100 of 100 rows.*"
            r"chunk_size= below 100"
        ) as caught:
            H @ torch.ones(2, 16)
        assert "3 GiB" in str(caught.value.__cause__)
    model.limit = 64
    small = fi.Hessian(model, F.cross_entropy, data, chunk_size=50)  # what the message says
    assert (small @ torch.ones(16)).isfinite().all()


def test_gradients_features_scores_and_training(model: Greedy, data: TensorDataset) -> None:
    model.limit = 64
    with refused("the gradient of 100 rows: pass a chunk_size= below 100"):
        fi.mean_gradient(model, F.cross_entropy, data)
    fi.mean_gradient(model, F.cross_entropy, data, chunk_size=50)
    with refused("a batch of 80 rows: use a loader with a smaller batch_size"):
        fi.extract(model, DataLoader(data, 80), progress=False)
    H = fi.Hessian(model, F.cross_entropy, data, chunk_size=50)
    options: dict[str, Any] = {"curvature": H, "damping": 0.1}
    with refused("90 training examples along 5 directions: pass a train_chunk= below 90"):
        fi.influence_scores(
            model, F.cross_entropy, data, (data[:5]), test_chunk=5, train_chunk=90, **options
        )
    with refused("a step of 70 rows: use a smaller batch_size"):
        train(model, data, epochs=1, batch_size=70)


def test_the_nearest_explanation_stays(model: Greedy, data: TensorDataset) -> None:
    """A product inside a solve for scores: the chunk is to blame, not the number of tests."""
    H = fi.Hessian(model, F.cross_entropy, data)
    model.limit = 64
    with refused("chunk_size= below 100"):
        fi.influence_scores(
            model, F.cross_entropy, data, (data[:5]), curvature=H, damping=0.1, train_chunk=50
        )


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="^other$"), memory_for("a", "b"):
        raise RuntimeError("other")


def test_dense_matrices() -> None:
    class NoMemory:
        dim = 9

        def __matmul__(self, v: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with refused("9 x 9 parameters.*use cg or lissa"):
        fi.exact(NoMemory(), torch.ones(9), damping=0.1)


@pytest.mark.gpu
def test_peak_of_a_gpu(gpu: str) -> None:
    device = torch.device(gpu)
    held = torch.ones(1 << 20, device=gpu)
    with peak_memory(device) as peak:
        a = torch.ones(4 << 20, device=gpu)
        del a
        b = torch.ones(1 << 20, device=gpu)
    assert peak.device == "cuda"
    assert peak.megabytes == pytest.approx(16, abs=1)
    assert held.sum() == b.sum()


@pytest.mark.gpu
def test_memory_that_really_runs_out(gpu: str) -> None:
    class Hungry(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] > 64:
                x.new_empty(1 << 45)
            return super().forward(x)

    model = Hungry(3, 4).to(gpu)
    data = torch.randn(100, 3), torch.arange(100) % 4
    with refused("chunk_size= below 100"):
        fi.Hessian(model, F.cross_entropy, data) @ torch.ones(16, device=gpu)


def test_choice_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastif_ext import device as module

    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device must be one of cpu, cuda, auto; got 'tpu'"):
        choose_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="'cuda' cannot be used: torch finds no CUDA device"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "KERNELS", ("cpu",))
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="has no CUDA kernels"):
        choose_device("cuda")
    monkeypatch.setattr(module, "KERNELS", ("cpu", "cuda"))
    assert choose_device("auto").type == choose_device("cuda").type == "cuda"


def flags() -> tuple[Any, ...]:
    cudnn = torch.backends.cudnn
    precision = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.allow_tf32
    return *precision, cudnn.deterministic, cudnn.benchmark


@pytest.mark.parametrize("allowed", [True, False])
def test_convolutions_keep_their_digits_and_the_flags_their_value(allowed: bool) -> None:
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = allowed
        set_before = flags()
        with full_precision(torch.device("cuda")):
            assert not torch.backends.cudnn.allow_tf32
            assert torch.backends.cudnn.conv.fp32_precision != "tf32"
            assert torch.backends.cudnn.deterministic
        assert flags() == set_before
        with pytest.raises(KeyError), full_precision(torch.device("cuda")):
            raise KeyError
        assert flags() == set_before
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_who_allows_tf32_for_products_has_it_for_convolutions() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        was = flags()
        with full_precision(torch.device("cuda")):
            assert flags()[:3] == was[:3]
        assert flags() == was
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts Linux's page faults")
def test_freed_memory_is_used_again() -> None:
    """Three tensors of 14 MiB side by side: fresh pages each time until the allocator knows."""
    code = """
import resource, torch
from fastif_ext.memory import reuse_freed_memory

def fresh_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        [torch.ones(14 << 18) for _ in range(3)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh_pages()
before = fresh_pages()
reuse_freed_memory()
fresh_pages()
print(before, fresh_pages())
"""
    settings = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    if before < 10_000:
        pytest.skip("this process's allocator keeps freed memory anyway")
    assert after < before / 10
