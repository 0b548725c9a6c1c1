"""Faithful and fast influence functions for PyTorch.

Choose a representative subset of the training data (samplers), take the curvature of the loss on it
(Hessian), solve for the change of parameters (lissa, cg), remove a class (remove_class).
"""

from fastif_ext import distributed, reference
from fastif_ext.build import build_info
from fastif_ext.conjugate_gradients import cg
from fastif_ext.curvature import GaussNewton, Hessian, LinearSoftmaxHessian
from fastif_ext.diagnosis import Diagnosis, Finding, diagnose
from fastif_ext.diagnostics import (
    Calibration,
    Coverage,
    HvpError,
    calibration,
    coverage,
    effective_sample_size,
    hvp_error,
)
from fastif_ext.extract import Extracted, extract, open_store
from fastif_ext.influence import InfluenceResult, influence
from fastif_ext.kmeans import KMeans
from fastif_ext.lissa import lissa
from fastif_ext.metrics import ClassMetrics, class_metrics, f1_score
from fastif_ext.objective import mean_gradient
from fastif_ext.ops import (
    ClassSample,
    LissaStep,
    bottom_k,
    class_multinomial,
    curvature_multinomial,
    curvature_sizes,
    hvp_accumulate_,
    inclusion_probability,
    kmeans_assign,
    kmeans_candidates,
    kmeans_nearest,
    kmeans_update,
    kmeans_weighted,
    linear_softmax_hvp,
    lissa_update_,
    merge_samples,
    multinomial,
    softmax_hvp,
)
from fastif_ext.parameters import apply_update
from fastif_ext.preconditioner import LowRankPreconditioner
from fastif_ext.removal import (
    EditReport,
    RemovalReport,
    correct_labels,
    remove_class,
    remove_rows,
)
from fastif_ext.samplers import (
    AllRows,
    CurvatureSampler,
    FeatureSampler,
    LogitSampler,
    RandomSampler,
    ResidualSampler,
    StratifiedSampler,
    SubsetSampler,
    WeightedRandomSampler,
)
from fastif_ext.scores import influence_scores, self_influence
from fastif_ext.selection import select_parameters
from fastif_ext.solvers import SolveResult, exact
from fastif_ext.spectrum import SolverDivergence
from fastif_ext.tokens import TokenModel, TokenRows

__version__ = str(build_info()["version"])

__all__ = [
    "AllRows",
    "Calibration",
    "ClassMetrics",
    "ClassSample",
    "Coverage",
    "CurvatureSampler",
    "Diagnosis",
    "EditReport",
    "Extracted",
    "FeatureSampler",
    "Finding",
    "GaussNewton",
    "Hessian",
    "HvpError",
    "InfluenceResult",
    "KMeans",
    "LinearSoftmaxHessian",
    "LissaStep",
    "LogitSampler",
    "LowRankPreconditioner",
    "RandomSampler",
    "RemovalReport",
    "ResidualSampler",
    "SolveResult",
    "SolverDivergence",
    "StratifiedSampler",
    "SubsetSampler",
    "TokenModel",
    "TokenRows",
    "WeightedRandomSampler",
    "apply_update",
    "bottom_k",
    "build_info",
    "calibration",
    "cg",
    "class_metrics",
    "class_multinomial",
    "correct_labels",
    "coverage",
    "curvature_multinomial",
    "curvature_sizes",
    "diagnose",
    "distributed",
    "effective_sample_size",
    "exact",
    "extract",
    "f1_score",
    "hvp_accumulate_",
    "hvp_error",
    "inclusion_probability",
    "influence",
    "influence_scores",
    "kmeans_assign",
    "kmeans_candidates",
    "kmeans_nearest",
    "kmeans_update",
    "kmeans_weighted",
    "linear_softmax_hvp",
    "lissa",
    "lissa_update_",
    "mean_gradient",
    "merge_samples",
    "multinomial",
    "open_store",
    "reference",
    "remove_class",
    "remove_rows",
    "select_parameters",
    "self_influence",
    "softmax_hvp",
]
