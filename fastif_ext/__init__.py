"""Faithful and fast influence functions for PyTorch."""

from fastif_ext.build import build_info
from fastif_ext.curvature import Hessian
from fastif_ext.influence import InfluenceResult, influence
from fastif_ext.lissa import lissa
from fastif_ext.objective import mean_gradient
from fastif_ext.ops import LissaStep, lissa_update_
from fastif_ext.parameters import apply_update
from fastif_ext.solvers import SolverDivergence, SolveResult, cg, exact

__version__ = str(build_info()["version"])

__all__ = [
    "Hessian",
    "InfluenceResult",
    "LissaStep",
    "SolveResult",
    "SolverDivergence",
    "apply_update",
    "build_info",
    "cg",
    "exact",
    "influence",
    "lissa",
    "lissa_update_",
    "mean_gradient",
]
