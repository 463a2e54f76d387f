"""Draw spectral densities: one panel per checkpoint, plain and preconditioned over each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from drawing import COLORS, heading, legend_below, pairs
from spectrum_table import VARIANTS, kappa

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TICK: Any = {"markersize": 9, "markeredgewidth": 1.6}
DECADES = 6  # of |eigenvalue| that are shown; below them the axis is linear
BINS = 10  # per decade: finer peaks of the density could not be told apart
STRIP = 0.12  # share of the height for the ticks of the extreme eigenvalues


def draw(report: Mapping[str, Any], arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Draw what spectrum.json and spectrum.npz hold.

    The density is averaged over the bins of a symmetric logarithmic scale: differences of its cdf, exactly.
    """
    entries = report["checkpoints"]
    linear, edges = _bins(arrays)
    heights = {name: _average(arrays, name, edges) for name in _shown(entries)}
    one = min(1 / entry["parameters"] for entry in entries)  # the share of a single eigenvalue
    with pairs(len(entries), path, sharex=True, sharey=True) as (figure, grid):
        _scale(grid[0, 0], linear, edges, heights, one)
        for index, (axes, entry) in enumerate(zip(grid.flat, entries, strict=False)):
            _draw_panel(axes, index, entry, arrays, edges, heights)
        for axes in grid.flat[max(0, len(entries) - 2) : len(entries)]:
            axes.set_xlabel("eigenvalue λ  (loss per squared parameter unit)")
            axes.xaxis.set_tick_params(labelbottom=True)
        for axes in grid[:, 0]:
            axes.set_ylabel("density  (share per unit of λ)")
        legend_below(figure, grid[0, 0])


def _shown(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{index}/{name}" for index, entry in enumerate(entries) for name in VARIANTS if name in entry]


def _bins(arrays: Mapping[str, np.ndarray]) -> tuple[float, np.ndarray]:
    """The end of the linear part of the axis, and bin edges that are even on the axis."""
    values = np.concatenate([nodes for name, nodes in arrays.items() if name.endswith("/nodes")])
    linear = 10.0 ** (math.ceil(math.log10(np.abs(values).max() or 1.0)) - DECADES)

    def place(value: float) -> float:
        size = abs(value) / linear
        return math.copysign(size if size < 1 else 1 + math.log10(size), value)

    low, high = math.floor(BINS * place(values.min())) - 2, math.ceil(BINS * place(values.max())) + 2
    places = np.arange(low, high + 1) / BINS
    size = np.abs(places)
    return linear, np.sign(places) * linear * np.where(size < 1, size, 10.0 ** (size - 1))


def _average(arrays: Mapping[str, np.ndarray], name: str, edges: np.ndarray) -> np.ndarray:
    shares = np.interp(edges, arrays[f"{name}/grid"], arrays[f"{name}/cdf"], left=0.0)
    return np.diff(shares) / np.diff(edges)


def _scale(axes: Axes, linear: float, edges: np.ndarray, heights: dict[str, np.ndarray], one: float) -> None:
    axes.set_xscale("symlog", linthresh=linear)
    axes.set_xlim(edges[0], edges[-1])
    _set_ticks(axes, linear * 10.0 ** np.arange(DECADES + 1))
    # a bin with less than a part of an eigenvalue is the tail of a kernel
    real = [height[height * np.diff(edges) > 0.1 * one] for height in heights.values()]
    low, high = 0.5 * min(h.min() for h in real), 2 * max(h.max() for h in real)
    axes.set_yscale("log")
    axes.set_ylim(low * (low / high) ** (STRIP / (1 - STRIP)), high)


def _set_ticks(axes: Axes, decades: np.ndarray) -> None:
    """Every other decade; where less than three of them are seen, finer steps."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    low, high = axes.get_xlim()
    for positive in (decades[::2], decades, np.outer(decades, (1, 2, 5)).ravel()):
        ticks = [tick for tick in (*-positive, 0.0, *positive) if low <= tick <= high]
        if len(ticks) >= 3:
            break
    else:
        ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    if len(positive) > len(decades):  # those between decades are not all named by the scale's own formatter
        axes.xaxis.set_major_formatter("{x:g}")


def _draw_panel(
    axes: Axes,
    index: int,
    entry: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    edges: np.ndarray,
    heights: dict[str, np.ndarray],
) -> None:
    low, high = axes.get_ylim()
    base = low * (high / low) ** STRIP
    shown = [variant for variant in VARIANTS if variant in entry]
    floor = max(entry[variant]["condition"]["noise_floor"] for variant in shown)
    for variant in shown:
        row = VARIANTS.index(variant)
        height = heights[f"{index}/{variant}"]
        height = np.where(height > base, height, np.nan)
        color: Any = {"color": COLORS[row], "baseline": base}
        axes.stairs(height, edges, fill=True, alpha=0.15, **color)
        axes.stairs(height, edges, linewidth=1.8, label=variant, **color)
        # outliers hold too little weight to be seen as density: a tick for each, in a strip of their own
        eigenvalues = arrays[f"{index}/{variant}/eigenvalues"]
        strip = np.full(eigenvalues.shape, STRIP * (0.27 + 0.45 * row))
        axes.plot(eigenvalues, strip, "|", color=COLORS[row], transform=axes.get_xaxis_transform(), **TICK)
    axes.plot([], [], "|", color="#666666", label="extreme eigenvalues", **TICK)
    gray: Any = {"facecolor": "#99999960", "edgecolor": "#555555", "linewidth": 0.9}
    axes.axvspan(-floor, floor, label="noise floor", **gray)
    axes.set_title(title(entry))


def title(entry: Mapping[str, Any]) -> str:
    """Name the checkpoint and its condition numbers; below, how far the largest eigenvalue stands out."""
    shown = [entry[variant] for variant in VARIANTS if variant in entry]
    kappas = " → ".join(kappa(numbers["condition"]) for numbers in shown).replace(">=", "≥")
    text = f"{heading(entry['label'])}\nκ {kappas}"
    if all(numbers["exact"] for numbers in shown):
        ratios = " → ".join(_short(numbers["bulk"]["ratio"]) for numbers in shown)
        text += f"\nlargest λ / median |λ|  {ratios}"
    return text


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
