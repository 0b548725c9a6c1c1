"""Operators that draw rows: from logits, from curvature sizes, from weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastif_ext.ops._check import (
    can_read,
    check_count,
    check_no_grad,
    check_same_device,
    check_tensor,
    draw_seed,
    shape,
)
from fastif_ext.ops._marks import check_enough, check_logits, check_sizes, check_weights
from fastif_ext.ops.sample import ClassSample, empty_sample


def class_multinomial(
    logits: Tensor,
    k: int,
    *,
    replacement: bool = False,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
) -> ClassSample:
    """For every class, k rows drawn with probability proportional to its softmax probability.

    The law is that of ``torch.multinomial(softmax(logits, 1).T, k, replacement)``, drawn as the k
    earliest arrivals of Poisson processes with rates p = softmax(logits)[row, class] (Efraimidis
    and Spirakis 2006; Cohen and Kaplan 2007), with random numbers that are functions of
    (seed, row_offset + row, class). So the samples of chunks, merged, are the sample of the whole,
    bit for bit, and no n x Y intermediate is made.

    Args:
        logits: [n, Y], float32, float64, float16 or bfloat16. A logit of -inf has probability 0.
            Rows with NaN, or of nothing but -inf, are skipped and counted.
        k: draws per class; may exceed n.
        replacement: independent draws instead of distinct rows.
        seed: 64-bit seed; without it one is drawn from `generator`.
        generator: source of the seed; torch's default generator if None.
        row_offset: global id of row 0, for a chunk of a larger set.

    Returns:
        ClassSample: rows [Y, k] (global ids, -1 where a class has fewer rows of positive
        probability), log_keys [Y, k], log_threshold [Y], skipped [1].

    Raises:
        TypeError, ValueError: a shape, dtype or value that does not fit; the message names it.
        RuntimeError: +inf in logits (names the row), or logits requires grad in grad mode. On a GPU
            looking for the former waits for the kernel; under torch.compile and while a CUDA graph
            is captured, rows are -1, keys NaN and skipped -(1 + row) instead.

    Example:
        >>> import torch, fastif_ext as fi
        >>> logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, float("-inf")]])
        >>> fi.class_multinomial(logits, 2, seed=0).rows
        tensor([[0, 2],
                [1, 0]])
    """
    op = "class_multinomial"
    check_tensor(op, "logits", logits, dims=(2,))
    _check_draw(op, "k", k, replacement, row_offset)
    check_same_device(op, logits=logits)
    check_no_grad(op, logits=logits)
    seed = draw_seed(op, seed, generator)
    sample = ClassSample(
        *torch.ops.fastif_ext.class_multinomial(logits, k, replacement, seed, row_offset)
    )
    if logits.is_cuda and can_read(logits):
        check_logits(op, logits, sample.skipped)
    return sample


def bottom_k(
    weights: Tensor,
    k: int,
    *,
    replacement: bool = False,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
) -> ClassSample:
    """Draw k positions of each line of weights, with probability proportional to the weight.

    The machinery of `class_multinomial` for any weights: ``bottom_k(p.T, k)`` uses the random
    numbers of class_multinomial with probabilities p. A line is cut into chunks along n.

    Args:
        weights: [R, n] or [n], finite and not negative, with any sum; any strides.
        k: draws per line; may exceed n.
        replacement: independent draws instead of distinct positions.
        seed: 64-bit seed; without it one is drawn from `generator`.
        generator: source of the seed; torch's default generator if None.
        row_offset: global position of weights[..., 0].

    Returns:
        ClassSample: rows [R, k] (-1 where a line has fewer positive weights), log_keys [R, k],
        log_threshold [R]; [k] and [] for 1-D weights. skipped is 0.

    Raises:
        TypeError, ValueError: a shape, dtype or value that does not fit; the message names it.
        RuntimeError: a negative, NaN or infinite weight (names it), or weights requires grad. On a
            GPU, as in class_multinomial, rows are -1 and keys NaN where it cannot wait.

    Example:
        >>> import torch, fastif_ext as fi
        >>> sorted(fi.bottom_k(torch.tensor([1.0, 0.0, 2.0]), 2, seed=0).rows.tolist())
        [0, 2]
    """
    op = "bottom_k"
    check_tensor(op, "weights", weights, dims=(1, 2))
    _check_draw(op, "k", k, replacement, row_offset)
    check_same_device(op, weights=weights)
    check_no_grad(op, weights=weights)
    seed = draw_seed(op, seed, generator)
    lines = weights if weights.dim() == 2 else weights.unsqueeze(0)
    rows, log_keys, log_threshold = torch.ops.fastif_ext.bottom_k(
        lines, k, replacement, seed, row_offset
    )
    if weights.is_cuda and can_read(weights):
        check_weights(op, lines, log_threshold)
    if weights.dim() == 1:
        rows, log_keys, log_threshold = rows[0], log_keys[0], log_threshold[0]
    return ClassSample(rows, log_keys, log_threshold, rows.new_zeros(1))


def curvature_sizes(logits: Tensor, *, row_scale: Tensor | None = None) -> Tensor:
    """The trace of each row's softmax Hessian: sum_y p_y (1 - p_y), times row_scale.

    Computed without the cancellation of 1 - sum_y p_y^2: to 1e-6 relative, or, where that is more,
    6e-8 times the difference of the row's two largest logits.

    Args:
        logits: [n, Y], float32, float64, float16 or bfloat16. A row with NaN, or of nothing but
            -inf, has size 0.
        row_scale: [n], finite and not negative, for example |features|^2 + 1.

    Returns:
        float32 [n].

    Raises:
        TypeError, ValueError: a shape or dtype that does not fit; the message names it.
        RuntimeError: +inf in logits or a bad row_scale (names the row), or an input requires grad.
            On a GPU, as in class_multinomial, such a row has size NaN where it cannot wait.

    Example:
        >>> import torch, fastif_ext as fi
        >>> fi.curvature_sizes(torch.tensor([[0.0, 0.0], [40.0, 0.0]]))
        tensor([5.0000e-01, 8.4967e-18])
    """
    op = "curvature_sizes"
    row_scale = _check_curvature(op, logits, row_scale)
    sizes: Tensor = torch.ops.fastif_ext.curvature_sizes(logits, row_scale)
    if logits.is_cuda and can_read(logits):
        check_sizes(op, logits, sizes)
    return sizes


def curvature_multinomial(
    logits: Tensor,
    m: int,
    *,
    row_scale: Tensor | None = None,
    floor: float = 0.0,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
) -> ClassSample:
    """One pool of m rows without replacement, of sizes floor + curvature_sizes(logits).

    Equal to ``bottom_k(floor + curvature_sizes(logits, row_scale=row_scale), m)`` bit for bit, in
    one pass. With `inclusion_probability` it gives Horvitz-Thompson weights.

    Args:
        logits: [n, Y], as for `curvature_sizes`.
        m: draws; may exceed n.
        row_scale: [n], finite and not negative.
        floor: finite and not negative, added to every size (rows of NaN too): a share of uniform
            sampling. The same constant for all chunks keeps their samples mergeable.
        seed: 64-bit seed; without it one is drawn from `generator`.
        generator: source of the seed; torch's default generator if None.
        row_offset: global id of row 0, for a chunk of a larger set.

    Returns:
        ClassSample: rows [m] (-1 where fewer sizes are positive), log_keys [m], log_threshold [],
        skipped [1] (rows with NaN, or of nothing but -inf).

    Raises:
        TypeError, ValueError: a shape, dtype or value that does not fit; the message names it.
        RuntimeError: +inf in logits or a bad row_scale (names the row), or an input requires grad.
            On a GPU as in class_multinomial.

    Example:
        >>> import torch, fastif_ext as fi
        >>> logits = torch.tensor([[9.0, 0.0], [0.0, 0.0], [0.0, 50.0]])
        >>> fi.curvature_multinomial(logits, 2, seed=0).rows
        tensor([1, 0])
    """
    op = "curvature_multinomial"
    row_scale = _check_curvature(op, logits, row_scale)
    _check_draw(op, "m", m, False, row_offset)
    if not 0 <= floor < float("inf"):
        raise ValueError(f"{op}: floor must be finite and not negative, got {floor}")
    seed = draw_seed(op, seed, generator)
    sample = ClassSample(
        *torch.ops.fastif_ext.curvature_multinomial(logits, m, seed, row_offset, row_scale, floor)
    )
    if logits.is_cuda and can_read(logits):
        check_logits(op, logits, sample.skipped)
    return sample


def multinomial(
    input: Tensor,
    num_samples: int,
    replacement: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Tensor:
    """Drop-in for torch.multinomial, for more than 2^24 categories and never a zero weight.

    Same arguments, shapes and law; the order of the draws is that of successive sampling. The
    random numbers are others: a seed of 64 bits is drawn from `generator` (or given). Made for long
    lines (15 times torch's speed for 1000 of 1e6 without replacement); torch.multinomial is faster
    for many short lines, and for more draws with replacement than there are categories.

    Args:
        input: weights [n] or [R, n], finite and not negative, each line with a positive sum.
        num_samples: draws per line, at least 1; without replacement at most the number of positive
            weights of each line.
        replacement: whether a position may be drawn again.
        generator: source of the seed; torch's default generator if None.
        seed: the seed itself, for torch.compile and reproducible draws.

    Returns:
        int64 [num_samples] or [R, num_samples].

    Raises:
        TypeError, ValueError: a shape, dtype or value that does not fit; the message names it.
        RuntimeError: a negative, NaN or infinite weight; a line with too few positive weights. On a
            GPU rows are -1 instead where it cannot wait, as in class_multinomial.

    Example:
        >>> import torch, fastif_ext as fi
        >>> fi.multinomial(torch.tensor([0.0, 0.0, 3.0]), 4, replacement=True)
        tensor([2, 2, 2, 2])
    """
    op = "multinomial"
    check_tensor(op, "input", input, dims=(1, 2))
    check_count(op, "num_samples", num_samples, low=1)
    if not replacement and num_samples > input.shape[-1]:
        raise ValueError(
            f"{op}: num_samples is {num_samples}, but input has {input.shape[-1]} categories; "
            f"draw fewer, or with replacement=True"
        )
    check_same_device(op, input=input)
    input = input.detach()  # rows have no gradient, and torch.multinomial takes such weights, too
    seed = draw_seed(op, seed, generator)
    lines = input if input.dim() == 2 else input.unsqueeze(0)
    rows, _, log_threshold = torch.ops.fastif_ext.bottom_k(
        lines, num_samples, replacement, seed, 0, True
    )
    if input.is_cuda and can_read(input):
        check_weights("bottom_k", lines, log_threshold)
        check_enough(rows)
    return rows if input.dim() == 2 else rows[0]


def _check_draw(op: str, name: str, count: int, replacement: bool, row_offset: int) -> None:
    check_count(op, name, count, low=0, high=2**32 - 2 if replacement else None)
    check_count(op, "row_offset", row_offset, low=0)


def _check_curvature(op: str, logits: Tensor, row_scale: Tensor | None) -> Tensor | None:
    check_tensor(op, "logits", logits, dims=(2,))
    if row_scale is not None:
        check_tensor(op, "row_scale", row_scale, dims=(1,))
        if row_scale.shape[0] != logits.shape[0]:
            raise ValueError(
                f"{op}: row_scale has length {row_scale.shape[0]}, logits has shape {shape(logits)}"
            )
    check_same_device(op, logits=logits, row_scale=row_scale)
    check_no_grad(op, logits=logits, row_scale=row_scale)
    return None if row_scale is None else row_scale.to(torch.float64)


@torch.library.register_fake("fastif_ext::class_multinomial")
def _(
    logits: Tensor, k: int, replacement: bool, seed: int, row_offset: int = 0
) -> tuple[Tensor, ...]:
    return *empty_sample(logits, (logits.shape[1], k)), logits.new_empty(1, dtype=torch.int64)


@torch.library.register_fake("fastif_ext::bottom_k")
def _(
    weights: Tensor,
    k: int,
    replacement: bool,
    seed: int,
    row_offset: int = 0,
    require_k: bool = False,
) -> tuple[Tensor, ...]:
    return empty_sample(weights, (weights.shape[0], k))


@torch.library.register_fake("fastif_ext::curvature_sizes")
def _(logits: Tensor, row_scale: Tensor | None = None) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@torch.library.register_fake("fastif_ext::curvature_multinomial")
def _(
    logits: Tensor,
    m: int,
    seed: int,
    row_offset: int = 0,
    row_scale: Tensor | None = None,
    floor: float = 0.0,
) -> tuple[Tensor, ...]:
    return *empty_sample(logits, (m,)), logits.new_empty(1, dtype=torch.int64)
