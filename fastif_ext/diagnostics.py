"""How good a subset is: error of its Hessian, coverage, calibration, effective sample size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastif_ext import ops
from fastif_ext.samplers.base import check_labels, check_logits
from fastif_ext.spectrum import apply


class HvpError(NamedTuple):
    """Relative error of a subset's Hessian products."""

    mean: float
    """Mean over the probes of |H_S v - H v| / |H v|."""
    low: float
    high: float
    """The smallest and the largest of them."""


def hvp_error(H_subset: Any, H_full: Any, *, probes: int = 8, seed: int = 0) -> HvpError:
    """Relative error |H_S v - H v| / |H v| of a subset's products, over standard normal v.

    Args:
        H_subset: the operator of the subset, with ``H @ v`` for v [R, p] (or a matrix).
        H_full: the operator it stands for: of all rows, or of a larger subset.
        probes: number of vectors v.
        seed: of the vectors.

    Returns:
        HvpError(mean, low, high).

    Raises:
        ValueError: operators of different size, probes below 1, H_full v = 0.

    Example:
        >>> import torch, fastif_ext as fi
        >>> H = torch.diag(torch.tensor([1.0, 2.0]))
        >>> round(fi.hvp_error(1.1 * H, H).mean, 4)
        0.1
    """
    dims = [H.shape[0] if isinstance(H, Tensor) else H.dim for H in (H_subset, H_full)]
    if dims[0] != dims[1]:
        raise ValueError(
            f"hvp_error: H_subset has {dims[0]} parameters, H_full {dims[1]}; select the same"
        )
    if probes < 1:
        raise ValueError(f"hvp_error: probes must be at least 1, got {probes}")
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(probes, dims[1], generator=generator, dtype=torch.float64)
    v = v.to(H_full.device, H_full.dtype)
    want = apply(H_full, v).double()
    size = want.norm(dim=1)
    if not (size > 0).all():
        raise ValueError("hvp_error: H_full v is 0; the loss has no curvature on its rows")
    errors = (apply(H_subset, v).double() - want).norm(dim=1) / size
    return HvpError(float(errors.mean()), float(errors.min()), float(errors.max()))


class Coverage(NamedTuple):
    """How a subset lies in feature space."""

    distance: float
    """Mean squared distance of a row to the nearest row of the subset, as a multiple of the same
    for random subsets of that size: below 1 it covers the space better than they do."""
    farthest: float
    """The same for the row that is farthest from the subset."""
    classes: float | None
    """Share of the labels that occur in the subset; None where no labels were given."""


def coverage(
    features: Tensor,
    indices: Tensor,
    *,
    labels: Tensor | None = None,
    draws: int = 5,
    seed: int = 0,
) -> Coverage:
    """How well a subset covers feature space, next to random subsets of its size.

    Coverage is what the feature samplers aim at. It says nothing of the weights: a subset may
    cover the space well and still give a biased Hessian (FeatureSampler, mode "nearest", does).

    Args:
        features: [n, d], of all rows.
        indices: int64 [m], the rows of the subset.
        labels: int64 [n]; where given, the share of labels that occur is told too.
        draws: random subsets to compare with; the mean over them is taken.
        seed: of the random subsets.

    Returns:
        Coverage(distance, farthest, classes).

    Raises:
        ValueError: shapes that do not fit, indices out of range, draws below 1.

    Example:
        >>> import torch, fastif_ext as fi
        >>> x = torch.cat([torch.randn(90, 2), 50 + torch.randn(10, 2)])
        >>> fi.coverage(x, torch.arange(10)).distance > 1  # nothing of the far group
        True
    """
    if not isinstance(features, Tensor) or features.dim() != 2:
        got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"coverage: features must be a tensor [n, d], got {got}")
    n = len(features)
    if indices.dtype != torch.int64 or indices.dim() != 1 or len(indices) == 0:
        raise ValueError(
            f"coverage: indices must be a non-empty int64 tensor [m], got {indices.dtype} of shape "
            f"{list(indices.shape)}"
        )
    if not 0 <= int(indices.min()) <= int(indices.max()) < n:
        raise ValueError(
            f"coverage: indices must lie in [0, {n}), got {int(indices.min())} to "
            f"{int(indices.max())}"
        )
    if draws < 1:
        raise ValueError(f"coverage: draws must be at least 1, got {draws}")
    features = features.detach().float()

    def distances(rows: Tensor) -> tuple[float, float]:
        _, squared = ops.kmeans_assign(features, features[rows.to(features.device)])
        squared = squared.double()
        return float(squared.mean()), float(squared.max())

    generator = torch.Generator().manual_seed(seed)
    random = [
        distances(torch.randperm(n, generator=generator)[: len(indices)]) for _ in range(draws)
    ]
    mean, farthest = (
        own / max(sum(others) / draws, 1e-300) if own else 0.0
        for own, others in zip(distances(indices), zip(*random, strict=True), strict=True)
    )
    present = None
    if labels is not None:
        labels = check_labels("coverage", labels, n=n)
        present = len(labels[indices.cpu()].unique()) / len(labels.unique())
    return Coverage(mean, farthest, present)


class Calibration(NamedTuple):
    """How a model's probabilities agree with the labels."""

    ratios: Tensor
    """sum_i p_iy / n_y for every label y that occurs, float64."""
    worst: float
    """The largest |ratio - 1|."""
    marginal: tuple[float, float]
    """The smallest and largest n times the chance of a row in one draw of the logit sampler,
    averaged over the classes: both 1 where it samples uniformly."""
    expected_error: float
    """Expected calibration error of the largest probability, 15 bins."""


def calibration(logits: Tensor, labels: Tensor) -> Calibration:
    """Whether the premise under which logit sampling is uniform holds for a model.

    At a minimum of cross-entropy with free biases, sum_i p_iy = n_y for every class y. A row's
    chance in the logit sampler, averaged over classes in proportion to their size, is then exactly
    1/n: class-wise logit sampling is stratified random sampling in another guise. Where the ratios
    are far from 1 the model is not at such a minimum.

    Args:
        logits: [n, Y].
        labels: int64 [n].

    Returns:
        Calibration(ratios, worst, marginal, expected_error).

    Raises:
        ValueError, TypeError: NaN logits, labels that do not fit.

    Example:
        >>> import torch, fastif_ext as fi
        >>> fi.calibration(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])).ratios
        tensor([1., 1.], dtype=torch.float64)
    """
    logits = check_logits("calibration", logits).cpu().double()
    labels = check_labels("calibration", labels, n=len(logits), classes=logits.shape[1])
    if len(labels) == 0:
        raise ValueError("calibration: logits has no rows")
    p = logits.softmax(1)
    mass, counts = p.sum(0), labels.bincount(minlength=logits.shape[1]).double()
    occurs = counts > 0
    ratios = (mass / counts)[occurs]
    # one draw for class y takes row i with p_iy / mass_y; a class counts by its share of the rows
    chance = (p[:, occurs] / mass[occurs].clamp_min(1e-300) * counts[occurs]).sum(1)
    confidence, guess = p.max(1)
    hit = (guess == labels).double()
    bins = (confidence * 15).long().clamp(max=14)
    size = bins.bincount(minlength=15).double()
    gap = torch.zeros(15, dtype=torch.float64).index_add_(0, bins, confidence - hit).abs()
    return Calibration(
        ratios,
        float((ratios - 1).abs().max()),
        (float(chance.min()), float(chance.max())),
        float(gap.sum() / size.sum()),
    )


def effective_sample_size(weights: Tensor) -> float:
    """Kish's effective sample size (sum w)^2 / sum w^2: m for equal weights, less for others.

    For unequal-probability sampling it is a caution, not a verdict: large weights on rows of little
    curvature do no harm, so a curvature sample of lower effective size can have the lower error.

    Args:
        weights: [m], not negative.

    Raises:
        ValueError: no weights, negative ones, or only zeros.

    Example:
        >>> import torch, fastif_ext as fi
        >>> fi.effective_sample_size(torch.tensor([1.0, 1.0, 0.0]))
        2.0
    """
    if not isinstance(weights, Tensor) or weights.dim() != 1 or len(weights) == 0:
        got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"effective_sample_size: weights must be a tensor [m], got {got}")
    w = weights.double()
    if not w.isfinite().all() or w.min() < 0 or w.sum() == 0:
        raise ValueError(
            "effective_sample_size: weights must be finite, not negative and not all 0"
        )
    return float(w.sum().square() / w.square().sum())
