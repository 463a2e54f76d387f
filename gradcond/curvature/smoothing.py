"""From weighted nodes to a density on a grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

POINTS = 2048
PADDING = 0.05  # of the range, on both sides
LINEAR_PART = 1e-6  # a symlog grid is linear below this share of max |lambda|


def evaluation_grid(grid: str | Tensor, nodes: Tensor, eps: float) -> Tensor:
    """Ascending points that cover the nodes with room for their kernels."""
    low, high, top = float(nodes.min()), float(nodes.max()), float(nodes.abs().max())
    if isinstance(grid, Tensor):
        points = grid.detach().to("cpu", torch.float64)
        ascending = points.ndim == 1 and len(points) > 1 and bool((points.diff() > 0).all())
        if not ascending or not bool(points.isfinite().all()):
            raise ValueError(f"expected ascending finite grid points (g,), got shape {tuple(grid.shape)}")
        if float(points[0]) > low or float(points[-1]) < high:
            raise ValueError(f"expected a grid that covers all nodes, {low:.6g} to {high:.6g}; widen it")
        return points
    if not isinstance(grid, str):
        raise TypeError(f"expected grid as a name or a torch tensor, got {type(grid).__name__}")
    # a spectrum of one point gets a range of its own size
    room = PADDING * (high - low) if high - low > 1e-3 * top else PADDING * (top or 1.0)
    if grid == "linear":
        return torch.linspace(low - room, high + room, POINTS, dtype=torch.float64, device="cpu")
    if grid == "symlog":
        unit = LINEAR_PART * (top or 1.0)
        start, end = math.asinh((low - room) / unit), math.asinh((high + room) / unit)
        return unit * torch.linspace(start, end, POINTS, dtype=torch.float64, device="cpu").sinh()
    if grid == "log":
        if not low > eps * top:
            raise ValueError(
                f"expected eigenvalues for a log grid above {eps * top:.3g}, where their sign is known, got "
                f'{low:.3g}; use "symlog"'
            )
        room = PADDING * (math.log(high / low) + 1)
        start, end = math.log(low) - room, math.log(high) + room
        return torch.linspace(start, end, POINTS, dtype=torch.float64, device="cpu").exp()
    raise ValueError(f'grid must be "linear", "symlog", "log" or a tensor, got {grid!r}')


def smooth(grid: Tensor, nodes: Tensor, weights: Tensor, uncertainty: Tensor, reach: int = 1) -> Tensor:
    """Density (..., g) on the grid (g,) of nodes (m,) ascending, each a Gaussian of mass its weight (..., m)."""
    # as wide as the node is uncertain, no wider than the way to its nearer neighbour, the reach-th on a side ...
    gaps = nodes[reach:] - nodes[:-reach]
    wide = torch.full((min(reach, len(nodes)),), torch.inf, dtype=nodes.dtype, device="cpu")
    width = torch.minimum(uncertainty, torch.minimum(torch.cat([gaps, wide]), torch.cat([wide, gaps])))
    # ... and no narrower than 1.5 steps: on one, single eigenvalues of a dense bulk would show as ripples
    place = torch.searchsorted(grid, nodes).clamp(1, len(grid) - 1)
    width = torch.maximum(width, 1.5 * (grid[place] - grid[place - 1]))
    kernel = (-0.5 * ((grid[:, None] - nodes) / width) ** 2).exp()
    return (weights / torch.trapezoid(kernel, grid, dim=0)) @ kernel.mT


def cumulative(grid: Tensor, density: Tensor) -> Tensor:
    """The share below each grid point (g,), by the trapezoidal rule."""
    steps = grid.diff() * (density[1:] + density[:-1]) / 2
    return torch.cat([steps.new_zeros(1), steps.cumsum(0)])
