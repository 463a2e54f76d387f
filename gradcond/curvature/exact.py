"""All eigenvalues of an operator small enough to be written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradcond.curvature.condition import FLOOR, ConditionNumber
from gradcond.curvature.dense import eigenvalues
from gradcond.curvature.density import SpectralDensity, exact_density
from gradcond.curvature.operators import Products


@dataclass(frozen=True)
class ExactSpectrum:
    """Every eigenvalue, and what the estimators estimate, computed from them. All float64, on the CPU."""

    eigenvalues: Tensor  # (n,) ascending; what the decomposition makes of zero is zero
    error: float  # bound on the error of each: rounding, and the asymmetry of the products
    trace: float
    density: SpectralDensity  # its nodes are the eigenvalues, each of weight 1/n; no sampling error
    condition: ConditionNumber
    num_matvecs: int


def exact_spectrum(
    A: Any,
    *,
    tol: float = 1e-2,
    grid: str | Tensor = "linear",
    chunk: int = 64,
    progress: Callable[[int], Any] | None = None,
) -> ExactSpectrum:
    """The whole spectrum of A from its n columns, by a dense decomposition in float64.

    It takes n products, n^2 numbers of memory and O(n^3) time, and leaves nothing to estimate: below a few
    thousand parameters it costs less than the estimates do, and it resolves what they cannot, the bulk next to
    zero.

    Args:
        A: any symmetric (n, n) thing with ``shape`` and ``@``.
        tol: error of lambda_min_nonzero allowed, relative to itself, as in `condition_number`.
        grid: of the density, as in `spectral_density`.
        chunk: columns of one product.
        progress: called with the number of products just done.

    Returns:
        The eigenvalues, their error, trace, density and condition number.

    Raises:
        ValueError: A is not square or not symmetric, or its products are not repeatable.

    Example:
        >>> spectrum = exact_spectrum(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> spectrum.eigenvalues, round(spectrum.condition.kappa, 4)
        (tensor([1., 3.], dtype=torch.float64), 3.0)
    """
    products = Products(A, progress)
    values, error = eigenvalues(products, chunk)
    return ExactSpectrum(
        eigenvalues=values,
        error=error,
        trace=float(values.sum()),
        density=exact_density(values, grid, products),
        condition=_condition(values, error, tol, products.count),
        num_matvecs=products.count,
    )


def _condition(values: Tensor, error: float, tol: float, count: int) -> ConditionNumber:
    sizes = values.abs()
    top, floor = float(sizes.max()), FLOOR * error
    above = sizes[sizes > floor]
    settled = above[error <= tol * above]
    smallest = float(settled.min()) if len(settled) else math.nan
    bound = max(1.0, (top - error) / (float(above.min()) + error)) if len(above) else 1.0
    if bound * smallest > (1 + 2 * tol) * top:  # something smaller is there, not known to tol
        smallest = math.nan
    return ConditionNumber(
        kappa=top / smallest,
        lambda_max=float(values[-1]),
        lambda_min=float(values[0]),
        lambda_min_nonzero=smallest,
        noise_floor=floor,
        resolved=not math.isnan(smallest),
        converged=len(settled) == len(above),
        kappa_lower_bound=bound,
        lower_bounds=torch.tensor([bound], dtype=torch.float64, device="cpu"),
        num_matvecs=count,
    )
