"""Samplers by name, and the statistics and tables of a comparison."""

from __future__ import annotations

import math

import pytest
import torch

import fastif_ext as fi
from fastif_ext import report
from fastif_ext.comparison import SAMPLERS, Record, make_sampler
from fastif_ext.memory import peak_memory


@pytest.fixture
def data() -> fi.Extracted:
    logits = 2 * torch.randn(400, 4)
    return fi.Extracted(logits, torch.randn(400, 6), logits.argmax(1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_by_name(name: str, data: fi.Extracted) -> None:
    a, b = (make_sampler(name, data, 40, seed=s) for s in (1, 1))
    assert len(a) == 40
    assert torch.equal(a.indices, b.indices)


def test_bad_names_and_missing_data(data: fi.Extracted) -> None:
    with pytest.raises(ValueError, match="name must be one of random, stratified.*got 'best'"):
        make_sampler("best", data, 10, seed=0)
    with pytest.raises(ValueError, match="needs features"):
        make_sampler("feature-nearest", data._replace(features=None), 10, seed=0)
    with pytest.raises(ValueError, match="needs labels"):
        make_sampler("stratified", data._replace(labels=None), 10, seed=0)
    with pytest.raises(ValueError, match="'logit' needs m >= 4 classes, got 3"):
        make_sampler("logit", data, 3, seed=0)


def test_interval_covers_the_mean() -> None:
    """95 % intervals of 200 samples of 20 normals: at least 85 % cover, false alarm < 1e-6."""
    g = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        got = report.interval(torch.randn(20, generator=g).tolist())
        hits += got.low <= 0 <= got.high
    assert hits >= 170
    with pytest.raises(ValueError, match="values is empty"):
        report.interval([])


def test_table_counts_failures_apart() -> None:
    records = [
        Record("random", 10, 0, f1=0.5, hvp_error=1.0, iterations=10),
        Record("random", 10, 1, f1=0.7, hvp_error=2.0, iterations=20),
        Record("random", 10, 2, failure="indefinite"),
        Record("retraining", None, None, f1=0.99),
    ]
    lines = report.table(records).splitlines()
    assert len({len(line) for line in lines}) == 1
    row = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert row[:3] == ["random", "10", "3"]
    assert row[3].startswith("0.600 [")
    assert row[-1] == "1"
    assert lines[3].split("|")[4].strip() == "0.990"


def test_peak_memory_sees_what_is_freed_again() -> None:
    with peak_memory() as peak:
        x = torch.ones(8_000_000)
        del x
    assert peak.megabytes is None or math.isclose(peak.megabytes, 32, abs_tol=8)
