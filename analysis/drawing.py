"""Figures that read at half size and in every kind of colour vision: colours, fonts, axes, saving."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command import InputError, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design", 2008, https://jfly.uni-koeln.de/color/; no yellow: faint on white
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FORMATS = (".png", ".pdf", ".svg")
STYLE: Any = {
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.labelsize": 14,
    "legend.fontsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "svg.hashsalt": "gradcond",  # the same numbers give the same file
}


def require_picture(path: Path) -> None:
    """Refuse a picture name of a format that cannot be drawn.

    Raises:
        InputError: if the suffix is none of FORMATS.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"a picture's name ends in {', '.join(FORMATS)}, got {path}")


@contextmanager
def panels(rows: int, columns: int, path: Path, **options: Any) -> Iterator[Any]:
    """Give a figure and its (rows, columns) axes to draw on, and save it at `path`, format by suffix.

    No pyplot: its list of figures is global, and grows.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with rc_context(STYLE):
        figure = Figure(figsize=(max(6.0 * columns, 8.0), 4.6 * rows), layout=ConstrainedLayoutEngine(h_pad=0.09))
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)
        with replacing(path) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=150, metadata=_undated(path))


@contextmanager
def pairs(count: int, path: Path, **options: Any) -> Iterator[Any]:
    """Give a figure and a grid of axes as `panels` does, two a row, with `count` that can be seen."""
    columns = min(count, 2)
    with panels(math.ceil(count / columns), columns, path, **options) as (figure, grid):
        for axes in grid.flat[count:]:
            axes.set_visible(False)
        yield figure, grid


def _undated(path: Path) -> dict[str, None]:
    return {} if path.suffix == ".png" else {"CreationDate" if path.suffix == ".pdf" else "Date": None}


def line_style(index: int) -> dict[str, Any]:
    """Return the colour and dashes of the `index`-th method: the same at every call, 21 different ones."""
    dashes = ("-", (0, (5, 1.5)), (0, (1, 1)))[index // len(COLORS) % 3]
    return {"color": COLORS[index % len(COLORS)], "linestyle": dashes, "linewidth": 2.0}


def literal(name: str) -> str:
    """Return a name of the user's as it is drawn letter by letter: "$" begins no formula, "_" hides no curve."""
    return "\u200b" * name.startswith("_") + name.replace("$", r"\$")


def heading(name: str, width: int = 32) -> str:
    """Return `literal(name)` in lines that fit above a panel."""
    return "\n".join(literal(name[at : at + width]) for at in range(0, len(name), width))


def legend_below(figure: Figure, axes: Axes) -> None:
    """Put the legend of `axes` under the panels, where it covers no data, in rows that fit."""
    handles, names = axes.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    # about 11 letters an inch, and 8 for the handle
    columns = max(1, min(len(names), int(11 * width / (max(map(len, names)) + 8))))
    figure.set_size_inches(width, height + 0.25 * ((len(names) - 1) // columns))
    figure.legend(handles, names, loc="outside lower center", ncols=columns)
