"""Draw how the ends of the spectrum and the condition number move from checkpoint to checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from drawing import COLORS, legend_below, literal, panels
from spectrum_table import VARIANTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DECADES = 4  # of |eigenvalue| that are shown; below them the axis is linear
LABELS = 16  # at most so many checkpoints are named on the axis


def draw_trajectory(report: Mapping[str, Any], path: Path) -> None:
    """Draw what spectrum.json holds of two checkpoints or more, in the order they were given."""
    entries = report["checkpoints"]
    variants = [variant for variant in VARIANTS if all(variant in entry for entry in entries)]
    with panels(1, 2, path) as (figure, grid):
        ends, kappas = grid[0]
        for row, variant in enumerate(variants):
            numbers = [entry[variant] for entry in entries]
            _draw_ends(ends, numbers, COLORS[row], variant)
            _draw_kappa(kappas, [own["condition"] for own in numbers], COLORS[row], variant)
        _scale_ends(ends)
        ends.set_ylabel("extreme eigenvalues λ")
        kappas.set_yscale("log")
        kappas.set_ylabel("condition number κ")
        every = math.ceil(len(entries) / LABELS)
        names = [literal(entry["label"]) for entry in entries][::every]
        # room for long ones, slanted, beside and below both panels
        room = 0.085 * max(0, *(len(name) - 10 for name in names))
        width, height = figure.get_size_inches()
        figure.set_size_inches(width + 2 * room, height + room)
        for axes in (ends, kappas):
            axes.set_xticks(range(0, len(entries), every), names, rotation=45, ha="right", rotation_mode="anchor")
        ends.plot([], [], "o", color="#555555", markerfacecolor="white", label="κ at least")
        legend_below(figure, ends)


def _draw_ends(axes: Axes, numbers: list[Any], color: str, variant: str) -> None:
    for end, label in (("largest", variant), ("smallest", None)):
        values = np.array([own[end]["eigenvalues"] for own in numbers], dtype=float)
        axes.plot(values[:, 0], "o-", color=color, linewidth=2.0, label=label)
        if values.shape[1] > 1:
            axes.plot(values[:, 1:], color=color, linewidth=0.9, alpha=0.6)


def _draw_kappa(axes: Axes, conditions: list[Any], color: str, variant: str) -> None:
    known = np.array([own["resolved"] and own["converged"] for own in conditions])
    values = np.array(
        [own["kappa"] if sure else own["kappa_lower_bound"] for own, sure in zip(conditions, known, strict=True)],
        dtype=float,
    )
    axes.plot(values, color=color, linewidth=2.0, label=variant)
    for sure, face in ((True, color), (False, "white")):
        axes.plot(np.flatnonzero(known == sure), values[known == sure], "o", color=color, markerfacecolor=face)


def _scale_ends(axes: Axes) -> None:
    sizes = np.abs(np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]))
    axes.set_yscale("symlog", linthresh=10.0 ** (math.ceil(math.log10(sizes.max() or 1.0)) - DECADES))
    axes.axhline(0.0, color="#999999", linewidth=0.8)
