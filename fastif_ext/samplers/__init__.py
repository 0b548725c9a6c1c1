"""Samplers that choose the subset on which the Hessian is estimated.

Each is a torch.utils.data.Sampler over the chosen rows, ``DataLoader(train, sampler=s)``, with

- ``indices``, int64 [m]: the rows, a multiset (a row drawn twice counts twice), and
- ``weights``, float32 [m]: the weight of each in ``H_S = sum_j weights_j Hess l(z_indices_j)``,
  an estimate of the mean Hessian over all n rows.

Random, stratified and curvature sampling are unbiased. The logit and feature samplers are the
paper's (arXiv 2510.26776) and weigh their rows equally, as the paper does.
"""

from fastif_ext.samplers.base import SubsetSampler
from fastif_ext.samplers.curvature import CurvatureFold, CurvatureSampler
from fastif_ext.samplers.feature import FeatureFold, FeatureSampler
from fastif_ext.samplers.fold import Fold
from fastif_ext.samplers.logit import LogitFold, LogitSampler
from fastif_ext.samplers.residual import ResidualFold, ResidualSampler
from fastif_ext.samplers.uniform import (
    AllRows,
    AllRowsFold,
    RandomFold,
    RandomSampler,
    StratifiedFold,
    StratifiedSampler,
)
from fastif_ext.samplers.weighted import WeightedRandomSampler

__all__ = [
    "AllRows",
    "AllRowsFold",
    "CurvatureFold",
    "CurvatureSampler",
    "FeatureFold",
    "FeatureSampler",
    "Fold",
    "LogitFold",
    "LogitSampler",
    "RandomFold",
    "RandomSampler",
    "ResidualFold",
    "ResidualSampler",
    "StratifiedFold",
    "StratifiedSampler",
    "SubsetSampler",
    "WeightedRandomSampler",
]
