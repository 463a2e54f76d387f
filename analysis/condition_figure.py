"""Draw condition numbers by layer: before and after, with the range over output units and the floor of BNP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from condition_table import title
from drawing import COLORS, heading, legend_below, pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP*"
UNITS: Any = {"alpha": 0.45, "linewidth": 3}
MOST = 24  # blocks of a panel: of more, names could not be read


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw what condition.json holds: a panel for each checkpoint, a line for each layer.

    Filled markers are known; open ones are lower bounds.
    """
    entries = report["checkpoints"]
    names = list(dict.fromkeys(name for entry in entries for name in entry["variants"]))
    with pairs(len(entries), path, sharex=True) as (figure, grid):
        most = max(min(len(entry["blocks"]), MOST) for entry in entries)
        figure.set_size_inches(figure.get_figwidth(), len(grid) * max(3.2, 1.6 + 0.42 * most))
        for axes, entry in zip(grid.flat, entries, strict=False):
            _draw_panel(axes, entry, names)
        low, high = np.log10(grid[0, 0].get_xlim())  # whole decades: of less, the numbers overlap
        grid[0, 0].set_xlim(10.0 ** np.floor(low), 10.0 ** np.ceil(high))
        for row, name in enumerate(names):
            grid[0, 0].plot([], [], MARKERS[row % 7], color=COLORS[row % len(COLORS)], label=name)
        grid[0, 0].plot([], [], color="#555555", label="output units", **UNITS)
        grid[0, 0].plot([], [], "|", color="black", markersize=14, markeredgewidth=2, label="corr(input)")
        grid[0, 0].plot([], [], "o", color="#555555", markerfacecolor="none", label="at least")
        legend_below(figure, grid[0, 0])


def _draw_panel(axes: Axes, entry: Mapping[str, Any], names: list[str]) -> None:
    blocks = entry["blocks"][:MOST]
    axes.set_xscale("log")
    for place, block in enumerate(blocks):
        for row, name in enumerate(names):
            if name in entry["variants"]:
                height = place + 0.5 * ((row + 0.5) / len(names) - 0.5)
                _draw_one(axes, block, name, height, row)
        floor = block["input_correlation"]
        if floor and floor["resolved"]:
            axes.plot(floor["kappa"], place, "|", color="black", markersize=16, markeredgewidth=2, zorder=1)
    left = len(entry["blocks"]) - len(blocks)
    axes.set_yticks(range(len(blocks)), [heading(title(block)) for block in blocks])
    axes.xaxis.set_tick_params(labelbottom=True)
    axes.set_ylim(len(blocks) - 0.5, -0.5)
    axes.set_xlabel("condition number κ" + (f"\n({left} more blocks in condition.json)" if left else ""))
    axes.set_title(heading(entry["label"]))


def _draw_one(axes: Axes, block: Mapping[str, Any], name: str, height: float, row: int) -> None:
    color: Any = COLORS[row % len(COLORS)]
    condition = block["kappa"][name]
    if condition["resolved"] and condition["converged"]:
        axes.plot(condition["kappa"], height, MARKERS[row % 7], color=color)
    elif condition["noise_floor"]:
        bound = condition["kappa_lower_bound"]
        axes.plot(bound, height, MARKERS[row % 7], color=color, markerfacecolor="none")
    if block["units"]:
        units = block["units"]["kappa"][name]
        if "min" in units:
            axes.plot([units["min"][0], units["max"][0]], [height, height], color=color, **UNITS)
