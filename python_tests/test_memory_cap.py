"""Passes over more rows than fit: in a process whose address space is capped."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

CAPPED = """
    import resource, sys
    import numpy as np
    import torch
    from pathlib import Path
    from torch.utils.data import DataLoader, IterableDataset
    import fastif_ext as fi
    from fastif_ext import blocks

    ROWS, CLASSES, BATCH = 1_500_000, 100, 10_000  # 600 MB of logits
    CAP = 250 * 2**20

    class Rows(IterableDataset):
        def __init__(self, rows):
            self.rows = rows

        def __iter__(self):
            for i in range(0, self.rows, BATCH):
                yield torch.randn(BATCH, 4, generator=torch.Generator().manual_seed(i))

    def loader(rows):
        return DataLoader(Rows(rows), batch_size=None)

    model = torch.nn.Linear(4, CLASSES)

    def cap():
        "No more than CAP above what the process has mapped by now."
        status = Path("/proc/self/status").read_text()
        now = int(status.split("VmSize:")[1].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (now + CAP, resource.RLIM_INFINITY))

    def refused(what):
        "Whether there is no memory for it."
        try:
            what()
        except (RuntimeError, MemoryError) as error:
            assert "memory" in str(error).lower() or isinstance(error, MemoryError), error
            return True
        return False
"""

LOGITS = """
    fi.LogitSampler.from_loader(model, loader(BATCH), 5, progress=False)  # code that loads lazily
    cap()
    logit = fi.LogitSampler.from_loader(model, loader(ROWS), 5, progress=False)
    curvature = fi.CurvatureSampler.from_loader(model, loader(ROWS), 500, progress=False)
    assert logit.n == curvature.n == ROWS
    assert refused(lambda: fi.extract(model, loader(ROWS), progress=False)), "the cap is too high"
    print("within the cap")
"""

KMEANS = """
    path, d, n = Path(sys.argv[1]) / "x.npy", 64, 1_200_000  # 307 MB
    x = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, d))
    noise = np.random.default_rng(0).standard_normal((10_000, d), dtype=np.float32)
    for i in range(0, n, 10_000):
        x[i : i + 10_000] = noise + 5 * (i // 10_000 % 3)
    del x

    class Chunks:
        def __iter__(self):
            with path.open("rb") as file:
                file.seek(128)
                while len(chunk := np.fromfile(file, np.float32, 50_000 * d)):
                    yield chunk.reshape(-1, d)

    blocks.BLOCK = 2**21
    kmeans = fi.KMeans(3, seed=0, max_iter=3)
    kmeans.fit([noise, noise + 5])  # code that loads lazily
    cap()
    kmeans.fit(Chunks())
    means = kmeans.cluster_centers_.mean(1).sort().values
    torch.testing.assert_close(means, torch.tensor([0.0, 5.0, 10.0]), atol=1e-2, rtol=0)
    assert refused(lambda: torch.from_numpy(np.load(path))), "the cap is too high"
    print("within the cap")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("work", [LOGITS, KMEANS], ids=["logits", "kmeans"])
def test_more_rows_than_fit(work: str, tmp_path: Path) -> None:
    # One arena and one thread: each thread's reserves address space that it never uses.
    env = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    code = textwrap.dedent(CAPPED) + textwrap.dedent(work)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env
    )
    assert done.stdout == "within the cap\n", done.stderr
