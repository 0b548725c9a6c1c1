"""Curvature of a model's loss on a fixed set of rows, as symmetric linear operators."""

from fastif_ext.curvature.factory import CURVATURES, check_curvature, make_curvature
from fastif_ext.curvature.gauss_newton import GaussNewton
from fastif_ext.curvature.hessian import Hessian
from fastif_ext.curvature.linear_softmax import LinearSoftmaxHessian, last_linear
from fastif_ext.curvature.normal import NormalEquations
from fastif_ext.curvature.operator import CurvatureOperator

__all__ = [
    "CURVATURES",
    "CurvatureOperator",
    "GaussNewton",
    "Hessian",
    "LinearSoftmaxHessian",
    "NormalEquations",
    "check_curvature",
    "last_linear",
    "make_curvature",
]
