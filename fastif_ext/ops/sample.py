"""What the sampling operators return: merging it, and the probabilities it implies."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastif_ext.ops._check import check_same_device, check_tensor, shape


class ClassSample(NamedTuple):
    """A sample of rows per class ([Y, k]) or of one pool ([m]), mergeable with `merge_samples`."""

    rows: Tensor
    """Global row ids, int64 [Y, k] or [m], in the order of the draw; -1 where there were none."""
    log_keys: Tensor
    """log(size) - log(arrival), float32, shape of `rows`, descending; -inf where row is -1."""
    log_threshold: Tensor
    """The next largest log_key, float32 [Y] or []; -inf if all rows are in the sample."""
    skipped: Tensor
    """How many rows of logits were NaN, or -inf throughout, int64 [1]."""


def merge_samples(a: ClassSample, b: ClassSample) -> ClassSample:
    """The sample of two disjoint sets of rows from the sample of each: exact, in any order.

    Both must come from one operator, with one seed and one k, over disjoint row ids (`row_offset`).

    Args:
        a: a sample, [Y, k] or [m].
        b: another of the same shape.

    Returns:
        ClassSample of the same shape: the k largest keys of both, ties by row id; the threshold is
        the next largest key; `skipped` is the sum.

    Raises:
        TypeError, ValueError: not two samples of one shape.

    Example:
        >>> import torch, fastif_ext as fi
        >>> w = torch.rand(100)
        >>> parts = [fi.bottom_k(w[i : i + 50], 3, seed=1, row_offset=i) for i in (0, 50)]
        >>> fi.merge_samples(*parts).rows.equal(fi.bottom_k(w, 3, seed=1).rows)
        True
    """
    op = "merge_samples"
    for name, sample in (("a", a), ("b", b)):
        if not isinstance(sample, ClassSample):
            raise TypeError(f"{op}: {name} must be a ClassSample, got {type(sample).__name__}")
        check_tensor(op, f"{name}.rows", sample.rows, dims=(1, 2), dtypes=(torch.int64,))
        if sample.log_keys.shape != sample.rows.shape or (
            sample.log_threshold.shape != sample.rows.shape[:-1]
        ):
            raise ValueError(
                f"{op}: {name} has rows {shape(sample.rows)}, log_keys {shape(sample.log_keys)} "
                f"and log_threshold {shape(sample.log_threshold)}; they do not fit together"
            )
    if a.rows.shape != b.rows.shape:
        raise ValueError(
            f"{op}: a has shape {shape(a.rows)}, b has {shape(b.rows)}; draw both with the same k"
        )
    check_same_device(op, a=a.rows, b=b.rows)
    rows, log_keys, log_threshold = torch.ops.fastif_ext.merge_samples(*a[:3], *b[:3])
    return ClassSample(rows, log_keys, log_threshold, a.skipped + b.skipped)


def inclusion_probability(size: Tensor, log_threshold: Tensor) -> Tensor:
    """The probability, given the threshold, that a row of this size is in the sample.

    1 - exp(-size * exp(-log_threshold)), 1 where the threshold is -inf. Its inverse is the
    Horvitz-Thompson weight of a row drawn without replacement: sums so weighted are unbiased.

    Args:
        size: sizes of the rows (p for `class_multinomial`, floor + curvature size, or weight),
            any floating dtype, broadcast against log_threshold.
        log_threshold: of the sample; ``log_threshold[:, None]`` against sizes [Y, k].

    Returns:
        Probabilities in size's dtype (float32 for half precision).

    Example:
        >>> import torch, fastif_ext as fi
        >>> fi.inclusion_probability(torch.tensor([0.5, 1.0]), torch.tensor(0.0))
        tensor([0.3935, 0.6321])
    """
    # in float64: thresholds of sure rows lie below -88, where float32 has no exp(-threshold)
    probability = -torch.expm1(-size.double() * torch.exp(-log_threshold.double()))
    probability = torch.where(torch.isneginf(log_threshold), 1.0, probability)
    return probability.to(torch.promote_types(size.dtype, torch.float32))


def empty_sample(like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised rows, log_keys and log_threshold, for fake kernels."""
    return (
        like.new_empty(shape, dtype=torch.int64),
        like.new_empty(shape, dtype=torch.float32),
        like.new_empty(shape[:-1], dtype=torch.float32),
    )


@torch.library.register_fake("fastif_ext::merge_samples")
def _(
    rows_a: Tensor,
    log_keys_a: Tensor,
    log_threshold_a: Tensor,
    rows_b: Tensor,
    log_keys_b: Tensor,
    log_threshold_b: Tensor,
) -> tuple[Tensor, ...]:
    return empty_sample(rows_a, tuple(rows_a.shape))
