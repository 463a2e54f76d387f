"""Condition the gradients that any torch optimizer receives, and measure what that does to the Hessian.

The analysis side is `gradcond.curvature`, imported on its own.
"""

from gradcond import attention, embedding, graph, recurrent  # noqa: F401  # their adapters register themselves
from gradcond._version import __version__
from gradcond.attach import Attachment, attach
from gradcond.bnp import BNP
from gradcond.centralization import GradientCentralization, WeightCentralization
from gradcond.clipping import NormClipping
from gradcond.conditioner import Conditioner
from gradcond.damping import RateDamping
from gradcond.initialization import unit_variance_init_
from gradcond.layers import Layer, register_layer
from gradcond.mean_shift import MeanShiftRejection, zero_mean_init_
from gradcond.optimizer import ConditionedOptimizer, wrap
from gradcond.preconditioner import Preconditioner, load_preconditioner
from gradcond.report import Report
from gradcond.schedule import ConditionerScheduler
from gradcond.sgld import SGLD
from gradcond.standardization import WeightStandardization

__all__ = [
    "BNP",
    "SGLD",
    "Attachment",
    "ConditionedOptimizer",
    "Conditioner",
    "ConditionerScheduler",
    "GradientCentralization",
    "Layer",
    "MeanShiftRejection",
    "NormClipping",
    "Preconditioner",
    "RateDamping",
    "Report",
    "WeightCentralization",
    "WeightStandardization",
    "__version__",
    "attach",
    "load_preconditioner",
    "register_layer",
    "unit_variance_init_",
    "wrap",
    "zero_mean_init_",
]
