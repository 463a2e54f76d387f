"""Matrix-free curvature: Hessian operators, Lanczos, spectra and condition numbers."""

from gradcond.curvature.condition import ConditionNumber, condition_number
from gradcond.curvature.density import Ratio, SpectralDensity
from gradcond.curvature.eigenpairs import Eigenpairs, eigsh
from gradcond.curvature.exact import ExactSpectrum, exact_spectrum
from gradcond.curvature.hessian import GGN, Hessian
from gradcond.curvature.operators import Operator
from gradcond.curvature.preconditioned import Preconditioned
from gradcond.curvature.probes import Estimate
from gradcond.curvature.spectrum import spectral_density
from gradcond.curvature.trace import diagonal, frobenius_norm, trace
from gradcond.curvature.tridiagonal import Tridiagonal, tridiagonalize

__all__ = [
    "GGN",
    "ConditionNumber",
    "Eigenpairs",
    "Estimate",
    "ExactSpectrum",
    "Hessian",
    "Operator",
    "Preconditioned",
    "Ratio",
    "SpectralDensity",
    "Tridiagonal",
    "condition_number",
    "diagonal",
    "eigsh",
    "exact_spectrum",
    "frobenius_norm",
    "spectral_density",
    "trace",
    "tridiagonalize",
]
