"""The spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradcond.curvature.dense import eigenvalues, with_zeros
from gradcond.curvature.density import SpectralDensity, exact_density
from gradcond.curvature.lanczos import Lanczos
from gradcond.curvature.operators import Products, generator_from, signs
from gradcond.curvature.pooling import pooled
from gradcond.curvature.root import eigenvalues_by_root
from gradcond.curvature.smoothing import cumulative, evaluation_grid, smooth

BLOCK = 8  # columns multiplied together where all are
POOL = 1 << 25  # numbers: bases that fit in here are kept and pooled
PER_START = 32  # n / 32 steps from each start balance the sampling error and the resolution (measured) ...
SHORTEST = 16  # ... down to this many


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
    its eigenvectors the weights, exact for polynomials of degree 2 m - 1. Where n is small beside the products,
    each probe splits its m steps over several starts, and the bases of all are pooled: what the other starts have
    found is known, and a start samples the rest (`gradcond.curvature.pooling`). A matrix of
    n <= num_matvecs num_probes is multiplied out instead, and exact; so is one of few outputs, see
    `condition_number`.

    The density puts a Gaussian on each node, as wide as the node is uncertain (its residual, at most the
    distance to its neighbours), so a converged outlier stays sharp beside a smooth bulk. Scaling A scales the
    result.

    Args:
        A: any symmetric (n, n) thing with ``shape`` and ``@``.
        num_matvecs: products per probe, at most; an invariant space ends a start early, and exactly.
        num_probes: random probes.
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
        >>> density = spectral_density(torch.diag(torch.tensor([1.0, 1.0, 1.0, 5.0])), 2, 1)
        >>> density.nodes, density.weights
        (tensor([1.0000, 5.0000], dtype=torch.float64), tensor([0.7500, 0.2500], dtype=torch.float64))
    """
    if num_matvecs < 1 or num_probes < 1:
        raise ValueError(f"expected at least one product and one probe, got {num_matvecs} and {num_probes}")
    products, generator = Products(A, progress), generator_from(seed)
    budget = num_matvecs * num_probes
    known = eigenvalues_by_root(products, min(2 * (budget - 1), products.n, POOL // products.n))
    if known is None and products.n <= budget:
        known = eigenvalues(products, BLOCK)
    if known is not None:
        return exact_density(with_zeros(known[0], products.n, 1), grid, products)
    measures = [pooled(runs) for runs in _pools(products, num_matvecs, num_probes, generator)]
    points = evaluation_grid(grid, torch.cat([nodes for nodes, _, _ in measures]), products.eps)
    # one curve per probe, each of mass one: their mean is the density, their scatter its error
    curves = torch.cat([smooth(points, *measure, reach=len(measure[1])) for measure in measures])
    density, count = curves.mean(0), len(curves)
    nodes = torch.cat([own.expand_as(weights).flatten() for own, weights, _ in measures])
    residuals = torch.cat([own.expand_as(weights).flatten() for _, weights, own in measures])
    weights = torch.cat([weights.flatten() for _, weights, _ in measures]) / count
    sizes = torch.tensor([weights.shape[1] for _, weights, _ in measures for _ in weights], device="cpu")
    probes = torch.repeat_interleave(torch.arange(count, device="cpu"), sizes)
    order = nodes.argsort(stable=True)
    return SpectralDensity(
        nodes=nodes[order],
        weights=weights[order],
        residuals=residuals[order],
        probes=probes[order],
        grid=points,
        density=density,
        cdf=cumulative(points, density),
        std_error=curves.std(0) / count**0.5 if count > 1 else torch.full_like(density, torch.nan),
        first_moments=torch.cat([weights @ own for own, weights, _ in measures]),
        lambda_max=float(nodes.max()),
        lambda_min=float(nodes.min()),
        num_matvecs=products.count,
    )


def _pools(products: Products, steps: int, num_probes: int, generator: torch.Generator) -> Iterator[list[Lanczos]]:
    """The runs that are pooled: all, or where their bases are too large to keep, each by itself."""
    if products.n * steps * num_probes > POOL:
        yield from ([_run(products, steps, generator)] for _ in range(num_probes))
        return
    parts = max(1, min(round(PER_START * steps / products.n), steps // SHORTEST))
    shares = [(steps + i) // parts for i in range(parts)]
    yield [_run(products, share, generator) for _ in range(num_probes) for share in shares]


def _run(products: Products, steps: int, generator: torch.Generator) -> Lanczos:
    """Lanczos from random signs; an invariant space ends it early."""
    start = signs(products.n, 1, generator)[:, 0]
    lanczos = Lanczos(products, start.to(products.device, products.work_dtype), generator=generator)
    lanczos.step()
    while lanczos.size < steps and not lanczos.invariant:
        lanczos.step()
    return lanczos
