"""Condition numbers that say what they know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradcond.curvature.lanczos import Lanczos
from gradcond.curvature.operators import Products, generator_from


@dataclass(frozen=True)
class ConditionNumber:
    """What is known of max|lambda| / min|lambda|, zero eigenvalues apart."""

    kappa: float  # max|lambda| / lambda_min_nonzero; nan when not resolved
    lambda_max: float  # algebraically largest eigenvalue seen
    lambda_min: float  # algebraically smallest eigenvalue seen
    lambda_min_nonzero: float  # smallest converged |lambda| above noise_floor; nan when there is none
    noise_floor: float  # an |lambda| below this cannot be told from zero
    resolved: bool  # whether lambda_min_nonzero exists
    converged: bool  # whether it is also the end of the search: nothing smaller is left in the Krylov space
    kappa_lower_bound: float  # certified by an explicit residual; the largest so far of lower_bounds
    lower_bounds: Tensor  # (steps,) float64, never falling: the bound after each product
    residual: float  # |A v - lambda v| of the pair behind lambda_min_nonzero, by an explicit product
    num_matvecs: int


def condition_number(
    A: Any,
    *,
    max_matvecs: int = 300,
    tol: float = 1e-3,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> ConditionNumber:
    """The condition number of A on its range, from Lanczos started inside the range."""
    products, generator = Products(A, progress), generator_from(seed)
    z = products.gaussian(generator)
    start = products(z)
    lanczos = Lanczos(products, start, generator=generator)
    bounds: list[float] = []
    steps = min(products.n, max(1, max_matvecs - 2))
    while lanczos.size < steps:
        lanczos.step()
        values, vectors, residuals = lanczos.eigh()
        floor = noise_floor(lanczos)
        bounds.append(max(_lower_bound(values, residuals, floor), bounds[-1] if bounds else 1.0))
        if lanczos.invariant:
            break
    floor = noise_floor(lanczos)
    values, vectors, residuals = lanczos.eigh()
    size = np.abs(values)
    good = np.flatnonzero((size > floor) & (residuals <= tol * size))
    top = size.max()
    if len(good):
        i = good[size[good].argmin()]
        v = lanczos.combine(vectors[:, [i]])[:, 0]
        image = products(v).double()
        smallest = float(v.double() @ image)
        residual = float((image - smallest * v.double()).norm())
    else:
        smallest, residual = float("nan"), float("nan")
    return ConditionNumber(
        kappa=float(top / abs(smallest)),
        lambda_max=float(values.max()),
        lambda_min=float(values.min()),
        lambda_min_nonzero=abs(smallest),
        noise_floor=floor,
        resolved=bool(len(good)),
        converged=bool(len(good)) and lanczos.invariant,
        kappa_lower_bound=bounds[-1],
        lower_bounds=torch.tensor(bounds, dtype=torch.float64),
        residual=residual,
        num_matvecs=products.count,
    )


def noise_floor(lanczos: Lanczos) -> float:
    """What an eigenvalue must exceed: rounding of A's dtype, or the measured noise of its products."""
    # a random symmetric m x m matrix of entries s has norm 2 s sqrt(m)
    return max(8 * lanczos.products.eps * lanczos.scale, 2 * lanczos.noise * lanczos.size**0.5)


def _lower_bound(values: np.ndarray, residuals: np.ndarray, floor: float) -> float:
    size = np.abs(values)
    sure = size - residuals > floor
    return float(size.max() / (size + residuals)[sure].min()) if sure.any() else 1.0
