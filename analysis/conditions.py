"""Measure condition numbers: of a matrix, of each layer's block and of each output unit's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from layer_blocks import LayerBlock
from matrices import conditioned
from spectra import Numbers, bulk, scalars
from torch import Tensor
from unfinished import Unfinished

from gradcond import curvature

PROBES = 3  # of the density, which takes as many products together as kappa may


class Conditions:
    """Condition numbers of principal sub-blocks of one matrix under several changes of variables.

    Up to `exact_below` parameters the matrix is written out once, and every number comes from all eigenvalues.
    Above, a block of m parameters is written out where that takes no more products than an estimate may,
    m <= max_matvecs.

    Args:
        matrix: the operator H; it is written out when the first number is measured.
        factors: P of each variant, None for H itself.
        keep: where earlier runs have left what they measured.
        exact_below: see above.
        max_matvecs: most products for an estimate.
        seed: of its random start.
        report: called with the number of products as they happen.
    """

    def __init__(
        self,
        matrix: Any,
        factors: Mapping[str, Any],
        keep: Unfinished,
        *,
        exact_below: int,
        max_matvecs: int,
        seed: int,
        report: Callable[[int], Any],
    ) -> None:
        self.H, self.factors, self.keep = matrix, factors, keep
        self.exact = matrix.shape[0] <= exact_below
        self.max_matvecs, self.seed, self.report = max_matvecs, seed, report
        self.options: Any = {} if self.exact else {"progress": report}
        self.matrices: dict[str, Any] = {}

    def of_all(self) -> Numbers:
        """Return the numbers of the whole matrix, by variant."""
        return {v: self.keep(v, "all", functools.partial(self._numbers_of, v)) for v in self.factors}

    def _numbers_of(self, variant: str) -> Numbers:
        return self._numbers(self._matrix(variant))

    def of_blocks(self, blocks: Mapping[str, Tensor]) -> dict[str, Numbers]:
        """Return the numbers of sub-blocks, by name and variant, from passes over the data that they share."""
        return self._by_name(blocks, self._matrix)

    def of_units(self, name: str, block: LayerBlock, most: int) -> Numbers:
        """Return the numbers of a layer's output units, of up to `most` where the matrix is not written out."""
        count = len(block.units)
        chosen = range(count) if self.exact else np.unique(np.linspace(0, count - 1, most).round().astype(int))
        # within the layer's block, so that a product costs what the layer does
        layer = functools.cache(lambda variant: _block(self._matrix(variant), block.index))
        rows = {f"{name}-{unit}": torch.searchsorted(block.index, block.units[unit]) for unit in chosen}
        measured = self._by_name(rows, layer).values()
        return {
            "count": count,
            "measured": [int(unit) for unit in chosen],
            "kappa": {variant: _listed([numbers[variant] for numbers in measured]) for variant in self.factors},
        }

    @functools.cached_property
    def _plain(self) -> Any:
        if not self.exact:
            return self.H
        self.H.check_deterministic()
        return self.H.to_dense(progress=self.report)

    def _matrix(self, variant: str) -> Any:
        if variant not in self.matrices:
            self.matrices[variant] = conditioned(self._plain, self.factors[variant])
        return self.matrices[variant]

    def _by_name(self, places: Mapping[str, Tensor], matrix: Callable[[str], Any]) -> dict[str, Numbers]:
        """The numbers of sub-blocks of a matrix, by name and variant: of what is kept, they are not even made."""
        found: dict[str, Numbers] = {name: {} for name in places}
        for variant in self.factors:
            new = [name for name in places if not self.keep.has(variant, name)]
            blocks = {name: _block(matrix(variant), places[name]) for name in new}
            names = {id(block): name for name, block in blocks.items()}

            def measure(block: Any, variant: str = variant, names: dict[int, str] = names) -> Numbers:
                return self.keep(variant, names[id(block)], lambda: self._numbers(block))

            if self.exact:
                measured = {name: measure(block) for name, block in blocks.items()}
            else:
                measured = curvature.each_block(blocks, measure)
            for name, index in places.items():
                again = functools.partial(self._numbers_of_block, matrix, variant, index)
                found[name][variant] = measured[name] if name in measured else self.keep(variant, name, again)
        return found

    def _numbers_of_block(self, matrix: Callable[[str], Any], variant: str, index: Tensor) -> Numbers:
        return self._numbers(_block(matrix(variant), index))

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
