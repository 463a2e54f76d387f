"""Measure condition numbers: of a matrix, of each layer's block and of each output unit's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from layer_blocks import LayerBlock
from spectra import Numbers, bulk, scalars
from torch import Tensor

from gradcond import curvature

PROBES = 3  # of the density, which takes as many products together as kappa may


class Conditions:
    """Condition numbers of principal sub-blocks of one matrix under several changes of variables.

    Up to `exact_below` parameters the matrix is written out once, and every number comes from all eigenvalues.
    Above, a block of m parameters is written out where that takes no more products than an estimate may,
    m <= max_matvecs.

    Args:
        matrix: the operator H.
        factors: P of each variant, None for H itself.
        exact_below: see above.
        max_matvecs: most products for an estimate.
        seed: of its random start.
        report: called with the number of products as they happen.
    """

    def __init__(
        self,
        matrix: Any,
        factors: Mapping[str, Any],
        *,
        exact_below: int,
        max_matvecs: int,
        seed: int,
        report: Callable[[int], Any],
    ) -> None:
        self.exact = matrix.shape[0] <= exact_below
        self.max_matvecs, self.seed = max_matvecs, seed
        self.options: Any = {} if self.exact else {"progress": report}
        if self.exact:
            matrix.check_deterministic()
            matrix = matrix.to_dense(progress=report)
        self.matrices: dict[str, Any] = {}
        for name, P in factors.items():
            K = matrix if P is None else curvature.Preconditioned(matrix, P)
            self.matrices[name] = K.to_dense() if self.exact and P is not None else K

    def of_all(self) -> Numbers:
        """Return the numbers of the whole matrix, by variant."""
        return {name: self._numbers(matrix) for name, matrix in self.matrices.items()}

    def of_block(self, index: Tensor) -> Numbers:
        """Return the numbers of the sub-block at these places, by variant."""
        return {name: self._numbers(_block(matrix, index)) for name, matrix in self.matrices.items()}

    def of_units(self, block: LayerBlock, most: int) -> Numbers:
        """Return the numbers of a layer's output units, of up to `most` where the matrix is not written out."""
        count = len(block.units)
        chosen = range(count) if self.exact else np.unique(np.linspace(0, count - 1, most).round().astype(int))
        # within the layer's block, so that a product costs what the layer does
        layer = {name: _block(matrix, block.index) for name, matrix in self.matrices.items()}
        rows = [torch.searchsorted(block.index, block.units[unit]) for unit in chosen]
        measured = [{name: self._numbers(_block(own, row)) for name, own in layer.items()} for row in rows]
        return {
            "count": count,
            "measured": [int(unit) for unit in chosen],
            "kappa": {name: _listed([numbers[name] for numbers in measured]) for name in self.matrices},
        }

    def _numbers(self, matrix: Any) -> Numbers:
        exact = self.exact or matrix.shape[0] <= self.max_matvecs
        if exact:
            spectrum = curvature.exact_spectrum(matrix, **self.options)
            condition, density = spectrum.condition, spectrum.density
        else:
            common = {"seed": self.seed, **self.options}
            condition = curvature.condition_number(matrix, max_matvecs=self.max_matvecs, **common)
            density = curvature.spectral_density(matrix, max(1, self.max_matvecs // PROBES), PROBES, **common)
        spread = bulk(density, condition.noise_floor, condition.lambda_max)
        return {"exact": exact, **scalars(condition), "bulk": spread}


def _block(matrix: Any, index: Tensor) -> Any:
    return matrix[index][:, index] if isinstance(matrix, Tensor) else matrix.block(index)


def _listed(measured: Sequence[Numbers]) -> Numbers:
    """What is told of units: a list of each number, and the range of kappa."""
    names = ("kappa", "kappa_lower_bound", "noise_floor", "lambda_max", "lambda_min", "resolved", "converged")
    lists = {name: [numbers[name] for numbers in measured] for name in names}
    curved = [numbers for numbers in measured if numbers["noise_floor"] > 0]
    return {**lists, "zero": len(measured) - len(curved), **(_range(curved) if curved else {})}


def _range(measured: Sequence[Numbers]) -> Numbers:
    """Smallest, median and largest kappa: [at least, at most], the same where all that it depends on is known."""
    known = [numbers["resolved"] and numbers["converged"] for numbers in measured]
    pairs = list(zip(measured, known, strict=True))
    low = [n["kappa"] if sure else n["kappa_lower_bound"] for n, sure in pairs]
    high = [n["kappa"] if sure else np.inf for n, sure in pairs]
    kinds: dict[str, Any] = {"min": np.min, "median": lambda x: np.sort(x)[(len(x) - 1) // 2], "max": np.max}
    return {kind: [float(pick(low)), float(pick(high))] for kind, pick in kinds.items()}
