"""The spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradcond.curvature.lanczos import Lanczos
from gradcond.curvature.operators import Products, generator_from
from gradcond.curvature.smoothing import cumulative, evaluation_grid, smooth


@dataclass(frozen=True)
class SpectralDensity:
    """Quadrature nodes of all probes together, and the smooth density they make. All float64, on the CPU.

    Example:
        >>> density = spectral_density(torch.diag(torch.tensor([1.0, 1.0, 1.0, 5.0])))
        >>> print(f"{density.quantile(0.5):.3f} {density.quantile(0.9):.3f}")
        1.000 5.000
    """

    nodes: Tensor  # (m,) ascending Ritz values of all probes
    weights: Tensor  # (m,) their sum is one
    probes: Tensor  # (m,) the probe a node belongs to
    grid: Tensor  # (g,) ascending
    density: Tensor  # (g,) per unit of lambda; its trapezoidal integral over grid is one
    cdf: Tensor  # (g,) share of the eigenvalues up to each grid point
    std_error: Tensor  # (g,) of the density over the probes; nan with a single probe
    first_moments: Tensor  # (num_probes,) z^T A z / z^T z: n times their mean estimates the trace
    lambda_max: float  # largest node
    lambda_min: float  # smallest node
    num_matvecs: int  # of all probes

    def quantile(self, q: float, absolute: bool = False, above: float = 0.0) -> float:
        """The eigenvalue (or |eigenvalue|) below which the share q lies, among those with |lambda| > above.

        nan when there is none.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q must be in [0, 1], got {q}")
        kept = self.nodes.abs() > above
        values, weights = self.nodes[kept], self.weights[kept]
        if len(values) == 0:
            return float("nan")
        values, order = (values.abs() if absolute else values).sort()
        shares = weights[order].cumsum(0) / weights.sum()
        return float(values[min(int((shares < q - 1e-12).sum()), len(values) - 1)])


def spectral_density(
    A: Any,
    num_matvecs: int = 80,
    num_probes: int = 5,
    seed: int = 0,
    *,
    grid: str | Tensor = "linear",
    progress: Callable[[int], Any] | None = None,
) -> SpectralDensity:
    """How the eigenvalues of A are spread: nodes with weights, and a density per unit of lambda.

    For a random sign vector z, z^T f(A) z / n has the mean (1/n) sum_i f(lambda_i); m steps of Lanczos from z
    give the Gauss quadrature of it: the eigenvalues theta of T are the nodes, the squared first components of
    its eigenvectors the weights, exact for polynomials of degree 2 m - 1. The density puts a Gaussian on each
    node, as wide as the node is uncertain (its residual, at most the distance to its neighbours), so a
    converged outlier stays sharp beside a smooth bulk. Scaling A scales the result.

    Args:
        A: any symmetric (n, n) thing with ``shape`` and ``@``.
        num_matvecs: products per probe, at most n are used.
        num_probes: independent probes.
        seed: of the probes; the same on every device.
        grid: "linear", "symlog" (fine around zero), "log" (positive spectra only), or ascending points that
            cover all nodes.
        progress: called with the number of products just done.

    Returns:
        The nodes and weights of all probes, and the density, its cumulative share and its standard error on
        the grid.

    Raises:
        ValueError: num_matvecs or num_probes < 1, an unknown or too short grid, "log" for a spectrum that is
            not positive, A is not square, not symmetric or not repeatable.

    References:
        G. H. Golub, J. H. Welsch, Calculation of Gauss quadrature rules, 1969.
        L. Lin, Y. Saad, C. Yang, Approximating spectral densities of large matrices, 2016.
        B. Ghorbani, S. Krishnan, Y. Xiao, An investigation into neural net optimization via Hessian
        eigenvalue density, 2019.

    Example:
        >>> density = spectral_density(torch.diag(torch.tensor([1.0, 1.0, 1.0, 5.0])), num_probes=1)
        >>> density.nodes, density.weights
        (tensor([1.0000, 5.0000], dtype=torch.float64), tensor([0.7500, 0.2500], dtype=torch.float64))
    """
    if num_matvecs < 1 or num_probes < 1:
        raise ValueError(f"expected at least one product and one probe, got {num_matvecs} and {num_probes}")
    products, generator = Products(A, progress), generator_from(seed)
    runs = [_quadrature(products, num_matvecs, generator) for _ in range(num_probes)]
    nodes, weights = (torch.cat([run[i] for run in runs]) for i in (0, 1))
    probes = torch.repeat_interleave(torch.arange(num_probes), torch.tensor([len(run[0]) for run in runs]))
    points = evaluation_grid(grid, nodes, products.eps)
    # one curve per probe, each of mass one: their mean is the density, their scatter its error
    curves = torch.stack([smooth(points, *run) for run in runs])
    density = curves.mean(0)
    order = nodes.argsort(stable=True)
    return SpectralDensity(
        nodes=nodes[order],
        weights=weights[order] / num_probes,
        probes=probes[order],
        grid=points,
        density=density,
        cdf=cumulative(points, density),
        std_error=curves.std(0) / num_probes**0.5 if num_probes > 1 else torch.full_like(density, torch.nan),
        first_moments=torch.stack([run[0] @ run[1] for run in runs]),
        lambda_max=float(nodes.max()),
        lambda_min=float(nodes.min()),
        num_matvecs=products.count,
    )


def _quadrature(products: Products, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, weights and residuals of one probe; an invariant space ends it early, and exactly."""
    signs = torch.randint(0, 2, (products.n,), generator=generator, dtype=torch.int8) * 2 - 1
    lanczos = Lanczos(products, signs.to(products.device, products.work_dtype), generator=generator)
    lanczos.step()
    while lanczos.size < steps and not lanczos.invariant:
        lanczos.step()
    nodes, vectors, residuals = lanczos.eigh()
    weights = torch.from_numpy(vectors[0] ** 2)
    return torch.from_numpy(nodes), weights / weights.sum(), torch.from_numpy(residuals)
