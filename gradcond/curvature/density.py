"""A spectral density: weighted nodes, a curve, and what is read from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcond.curvature.operators import Products
from gradcond.curvature.smoothing import cumulative, evaluation_grid, smooth


@dataclass(frozen=True)
class Ratio:
    """A ratio of quantiles, its standard error over the probes, and the uncertainty of the nodes themselves."""

    estimate: float
    std_error: float  # nan for a single probe
    resolution: float  # inf where the denominator cannot be told from zero


@dataclass(frozen=True)
class SpectralDensity:
    """Quadrature nodes of all probes together, and the smooth density they make. All float64, on the CPU.

    Example:
        >>> from gradcond.curvature import spectral_density
        >>> density = spectral_density(torch.diag(torch.tensor([1.0, 1.0, 1.0, 5.0])))
        >>> print(f"{density.quantile(0.5):.3f} {density.quantile(0.9):.3f}")
        1.000 5.000
    """

    # (m,) ascending Ritz values, zero where they cannot be told from it; what probes share is repeated for each
    nodes: Tensor
    weights: Tensor  # (m,) their sum is one
    residuals: Tensor  # (m,) |A y - theta y|: what a node stands for lies about that near
    probes: Tensor  # (m,) the probe a node belongs to
    grid: Tensor  # (g,) ascending
    density: Tensor  # (g,) per unit of lambda; its trapezoidal integral over grid is one
    cdf: Tensor  # (g,) share of the eigenvalues up to each grid point
    # (g,) of the density over the probes, up to 30 % too small where they share what they know (small n); nan with
    # a single probe, zero where it is exact
    std_error: Tensor
    first_moments: Tensor  # mean eigenvalue by each probe: n times their mean estimates the trace
    lambda_max: float  # largest node
    lambda_min: float  # smallest node
    num_matvecs: int  # of all probes

    def quantile(self, q: float, absolute: bool = False, above: float = -math.inf) -> float:
        """The eigenvalue (or |eigenvalue|) below which the share q lies, among all or those with |lambda| > above.

        nan when there is none.
        """
        kept = self.nodes.abs() > above
        values = self.nodes.abs() if absolute else self.nodes
        return _quantile(values[kept], self.weights[kept], q)

    def ratio(self, q: float = 0.5, above: float = -math.inf) -> Ratio:
        """How far the spectrum stands out of its bulk: max|lambda| / |lambda|_q, and what it is uncertain by.

        |lambda|_q is the quantile q of all |lambda|, or of those > above. The standard error is half the way
        between the ratios at q minus and q plus one standard error of the share below |lambda|_q, taken over the
        probes. The resolution is half the way between the ratios when all nodes are moved by their residuals,
        outwards and inwards: infinite where the quantile cannot be told from zero. Both are zero for an exact
        spectrum otherwise.

        References:
            R. S. Woodruff, Confidence intervals for medians and other position measures, 1952.

        Example:
            >>> from gradcond.curvature import spectral_density
            >>> spectral_density(torch.diag(torch.tensor([1.0, 1.0, 1.0, 5.0]))).ratio()
            Ratio(estimate=5.0, std_error=0.0, resolution=0.0)
        """
        sizes, kept = self.nodes.abs(), self.nodes.abs() > above
        top, error = float(sizes.max()), 0.0
        middle = _quantile(sizes[kept], self.weights[kept], q)
        if bool((self.std_error != 0).any()):
            error = self._share_error(kept, kept & (sizes <= middle))
        low, high = (_quantile(sizes[kept], self.weights[kept], min(max(q + d, 0), 1)) for d in (-error, error))
        moved = (sizes + sign * self.residuals for sign in (-1, 1))
        near, far = (_quantile(own[kept].clamp(min=0), self.weights[kept], q) for own in moved)
        most, least = (top / size if size else math.inf for size in (near, far))
        return Ratio(
            estimate=top / middle if middle else math.inf,
            std_error=(top / low - top / high) / 2 if low else math.inf,
            resolution=(most - least) / 2 if far else math.inf,
        )

    def _share_error(self, kept: Tensor, below: Tensor) -> float:
        """Standard error of the share of the nodes below among those kept, over the probes; nan for one."""
        none = torch.zeros(int(self.probes.max()) + 1, dtype=torch.float64, device="cpu")
        if len(none) == 1:
            return math.nan
        shares = [none.index_add(0, self.probes, self.weights * which) for which in (below, kept)]
        return float((shares[0] / shares[1]).std()) / len(none) ** 0.5


def exact_density(values: Tensor, grid: str | Tensor, products: Products) -> SpectralDensity:
    """The density of all eigenvalues (n,) ascending, each of weight 1/n."""
    points = evaluation_grid(grid, values, products.eps)
    weights, none = torch.full_like(values, 1 / len(values)), torch.zeros_like(values)
    density = smooth(points, values, weights, none)
    return SpectralDensity(
        nodes=values,
        weights=weights,
        residuals=none,
        probes=none.long(),
        grid=points,
        density=density,
        cdf=cumulative(points, density),
        std_error=torch.zeros_like(density),
        first_moments=values.mean().reshape(1),
        lambda_max=float(values[-1]),
        lambda_min=float(values[0]),
        num_matvecs=products.count,
    )


def _quantile(values: Tensor, weights: Tensor, q: float) -> float:
    if not 0 <= q <= 1 and not math.isnan(q):
        raise ValueError(f"q must be in [0, 1], got {q}")
    if len(values) == 0 or math.isnan(q):
        return math.nan
    values, order = values.sort()
    shares = weights[order].cumsum(0) / weights.sum()
    return float(values[min(int((shares < q - 1e-12).sum()), len(values) - 1)])
