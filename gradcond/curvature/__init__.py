"""Matrix-free curvature: Hessian operators, Lanczos, spectra and condition numbers."""

from gradcond.curvature.adaptive import optimizer_factor
from gradcond.curvature.blocks import each_block
from gradcond.curvature.composed import Block, Combination
from gradcond.curvature.condition import ConditionNumber, condition_number
from gradcond.curvature.density import Ratio, SpectralDensity
from gradcond.curvature.eigenpairs import Eigenpairs, eigsh
from gradcond.curvature.estimates import Estimate
from gradcond.curvature.exact import ExactSpectrum, exact_spectrum
from gradcond.curvature.factors import DiagonalFactor, Factor, ProductFactor
from gradcond.curvature.fisher import EmpiricalFisher, MonteCarloFisher
from gradcond.curvature.hessian import GGN, Hessian
from gradcond.curvature.kronecker import KroneckerFactor
from gradcond.curvature.objective import ModelLoss
from gradcond.curvature.operators import Operator
from gradcond.curvature.preconditioned import Preconditioned
from gradcond.curvature.preflight import Preflight, preflight
from gradcond.curvature.spectrum import spectral_density
from gradcond.curvature.trace import diagonal, frobenius_norm, trace
from gradcond.curvature.tridiagonal import Tridiagonal, tridiagonalize

__all__ = [
    "GGN",
    "Block",
    "Combination",
    "ConditionNumber",
    "DiagonalFactor",
    "Eigenpairs",
    "EmpiricalFisher",
    "Estimate",
    "ExactSpectrum",
    "Factor",
    "Hessian",
    "KroneckerFactor",
    "ModelLoss",
    "MonteCarloFisher",
    "Operator",
    "Preconditioned",
    "Preflight",
    "ProductFactor",
    "Ratio",
    "SpectralDensity",
    "Tridiagonal",
    "condition_number",
    "diagonal",
    "each_block",
    "eigsh",
    "exact_spectrum",
    "frobenius_norm",
    "optimizer_factor",
    "preflight",
    "spectral_density",
    "trace",
    "tridiagonalize",
]
