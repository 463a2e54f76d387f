"""All eigenvalues of an operator small enough to be written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradcond.curvature.condition import ConditionNumber, condition_of
from gradcond.curvature.dense import eigenvalues, with_zeros
from gradcond.curvature.density import SpectralDensity, exact_density
from gradcond.curvature.operators import Products
from gradcond.curvature.root import eigenvalues_by_root


@dataclass(frozen=True)
class ExactSpectrum:
    """Every eigenvalue, and what the estimators estimate, computed from them. All float64, on the CPU."""

    eigenvalues: Tensor  # (n,) ascending; what the decomposition makes of zero is zero
    error: float  # bound on the error of each: rounding, and the asymmetry of the products
    trace: float
    density: SpectralDensity  # its nodes are the eigenvalues, of weight 1/n a copy; no sampling error
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
    zero. GGN and Fisher matrices of r <= n outputs take r / 2 products, r n numbers and O(n r^2) time instead.

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
        >>> import torch
        >>> spectrum = exact_spectrum(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> spectrum.eigenvalues, round(spectrum.condition.kappa, 4)
        (tensor([1., 3.], dtype=torch.float64), 3.0)
    """
    products = Products(A, progress)
    values, error = eigenvalues_by_root(products, products.n) or eigenvalues(products, chunk)
    nodes = with_zeros(values, products.n, 1)
    return ExactSpectrum(
        eigenvalues=with_zeros(values, products.n),
        error=error,
        trace=float(values.sum()),
        density=exact_density(nodes, grid, products),
        condition=condition_of(nodes, error, tol, products.count),
        num_matvecs=products.count,
    )
