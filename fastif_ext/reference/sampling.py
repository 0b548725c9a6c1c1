"""Pure-PyTorch twins of the sampling operators: the definition, with every key computed.

Philox4x32-10 runs on int64 tensors, keys are made in double for all elements, and the sample is a
sort. Nothing here is gated, tiled or streamed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def philox4x32(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _widening_product(c0, 0xD2511F53)
        high1, low1 = _widening_product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]


def uniform(seed: int, element: Tensor, arrival: int = 0) -> Tensor:
    """The uniform of each element (int64) and arrival, float64 in (0, 1)."""
    counter = torch.div(element, 64, rounding_mode="floor") * 16 + element % 16
    place = torch.div(element, 16, rounding_mode="floor") % 4
    key = (seed & _LOW, (seed >> 32) & _LOW)

    def word(extension: int) -> Tensor:
        block = [
            counter & _LOW,
            counter >> 32,
            torch.full_like(counter, extension),
            torch.full_like(counter, arrival),
        ]
        words = torch.stack(philox4x32(block, key))
        return words.gather(0, place.unsqueeze(0))[0]

    first = word(0)
    long = (first * 2**32 + word(1)).double().add(0.5) * 2.0**-64
    return torch.where(first >= 2**12, (first.double() + 0.5) * 2.0**-32, long)


def class_multinomial(
    logits: Tensor, k: int, *, replacement: bool = False, seed: int, row_offset: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Twin of fastif_ext.class_multinomial."""
    x = logits.double()
    skipped = x.isnan().any(1) | x.isneginf().all(1) if x.shape[1] else x.new_zeros(len(x)).bool()
    if (x.isposinf().any(1) & ~skipped).any():
        raise RuntimeError("logits has +inf")
    log_p = torch.log_softmax(x, 1).masked_fill(skipped[:, None], float("-inf"))
    return *_sample(log_p.T, k, replacement, seed, row_offset), skipped.sum().reshape(1)


def bottom_k(
    weights: Tensor, k: int, *, replacement: bool = False, seed: int, row_offset: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of fastif_ext.bottom_k."""
    if not (weights.isfinite() & (weights >= 0)).all():
        raise RuntimeError("weights must be finite and not negative")
    lines = weights if weights.dim() == 2 else weights[None]
    rows, keys, threshold = _sample(lines.double().log(), k, replacement, seed, row_offset)
    return (rows, keys, threshold) if weights.dim() == 2 else (rows[0], keys[0], threshold[0])


def curvature_sizes(logits: Tensor, *, row_scale: Tensor | None = None) -> Tensor:
    """Twin of fastif_ext.curvature_sizes: sum_y p_y times the sum of the other p."""
    x = logits.double()
    if x.shape[1] == 0:
        return x.new_zeros(len(x), dtype=torch.float32)
    undefined = x.isnan().any(1) | x.isneginf().all(1)
    p, index = torch.softmax(x.masked_fill(undefined[:, None], 0), 1).max(1)
    others = torch.softmax(x.masked_fill(undefined[:, None], 0), 1)
    others.scatter_(1, index[:, None], 0)
    size = p * others.sum(1) + (others * (1 - others)).sum(1)
    if row_scale is not None:
        size = size * row_scale.double()
    return size.masked_fill(undefined, 0).float()


def curvature_multinomial(
    logits: Tensor,
    m: int,
    *,
    row_scale: Tensor | None = None,
    floor: float = 0.0,
    seed: int,
    row_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of fastif_ext.curvature_multinomial."""
    sizes = floor + curvature_sizes(logits, row_scale=row_scale)
    return bottom_k(sizes, m, seed=seed, row_offset=row_offset)


def merge_samples(
    a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of fastif_ext.merge_samples, on (rows, log_keys, log_threshold)."""
    k = a[0].shape[-1]
    rows, keys = torch.cat([a[0], b[0]], -1), torch.cat([a[1], b[1]], -1)
    rows, keys = _ordered(rows, keys)
    rest = torch.stack([a[2], b[2]], -1).amax(-1)
    if k > 0:
        rest = torch.maximum(rest, keys[..., k])
    return rows[..., :k], keys[..., :k], rest


def _sample(
    log_size: Tensor, k: int, replacement: bool, seed: int, row_offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k of all keys log_size - log(arrival); log_size is float64 [Y, n]."""
    classes, n = log_size.shape
    at = log_size.device
    row = torch.arange(row_offset, row_offset + n, device=at)
    element = row * classes + torch.arange(classes, device=at)[:, None]
    arrival = torch.zeros_like(log_size)
    keys = []
    for j in range(k + 1 if replacement else 1):
        arrival = arrival - torch.log1p(-uniform(seed, element, j))
        keys.append((log_size - arrival.log()).float())
    key = torch.cat(keys, 1)
    rows = row.repeat(len(keys)).expand(classes, -1).masked_fill(key.isneginf(), -1)
    missing = max(0, k + 1 - key.shape[1])
    rows, key = _ordered(
        torch.nn.functional.pad(rows, (0, missing), value=-1),
        torch.nn.functional.pad(key, (0, missing), value=float("-inf")),
    )
    return rows[:, :k], key[:, :k], key[:, k]


def _ordered(rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted by key descending, ties by row id."""
    rows, order = rows.sort(-1)
    keys, by_key = keys.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return rows.gather(-1, by_key), keys


def _widening_product(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of the product of 32-bit words; int64 holds no 64-bit product."""
    low, high = a * (constant & 0xFFFF), a * (constant >> 16)
    total = (low >> 16) + high
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)
