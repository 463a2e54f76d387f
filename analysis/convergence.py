"""Draw the convergence curves of several runs beside each other, and print where each one ended.

    python analysis/convergence.py RUN... --out FILE.png [--smooth N]

A RUN is a folder, named after its method, with metrics.csv (see metrics.py). Lines are means over seeds,
bands reach from the smallest seed to the largest (drawn for training only). Where a seed has no value, as it
diverged or ended early, there is no mean, and a cross ends the line of the loss. Beside the picture, FILE.npz
has the numbers: per method "METHOD/steps", and "METHOD/QUANTITY/mean", ".../min" and ".../max" for the three
quantities train_loss, train_accuracy and test_accuracy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from command import command_parser, ending, labels, require_folder, write_npz
from drawing import FORMATS, legend_below, line_style, literal, panels, require_picture
from metrics import QUANTITIES, Curves, load_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GOAL = 0.9  # the train accuracy whose first step is printed


def summary(curves: Curves) -> dict[str, str]:
    """Return the numbers to print for one method: means over seeds, or why there is none."""
    seeds = len(curves["train_loss"])
    told = {"seeds": str(seeds)}
    for name, form in zip(QUANTITIES, ("{:.4g}", "{:.1%}", "{:.1%}"), strict=True):
        known = np.isfinite(curves[name])
        # a loss that is missing at the end has diverged; accuracies may be evaluated less often
        last = -1 if name == "train_loss" else np.flatnonzero(known.any(axis=0))[-1:]
        ended = seeds - int(known[:, last].sum())
        if not known.any():
            told[name] = "-"
        elif ended:
            told[name] = f"{ended} of {seeds} ended early"
        else:
            told[name] = form.format(np.mean(curves[name][:, last]))
    reached = [curves["steps"][values >= GOAL][:1] for values in curves["train_accuracy"]]
    late = sum(not len(step) for step in reached)
    if late:
        told["steps"] = "not reached" if late == seeds else f"not reached by {late} of {seeds}"
    else:
        told["steps"] = f"{np.mean(np.concatenate(reached)):.0f}"
    return told


def print_table(runs: dict[str, Curves]) -> None:
    """Print one line per method."""
    header = ("method", "seeds", "final loss", "train acc.", "test acc.", f"steps to {GOAL:.0%}")
    lines = [header, *((name, *summary(curves).values()) for name, curves in runs.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells]).rstrip())


def bands(runs: dict[str, Curves]) -> Curves:
    """Return what is drawn: per method the steps, and mean, min and max over seeds of each quantity."""
    drawn: Curves = {}
    for method, curves in runs.items():
        drawn[f"{method}/steps"] = curves["steps"]
        for name in QUANTITIES:
            for reduction in (np.mean, np.min, np.max):  # NaN in any seed gives NaN: no mean of survivors
                drawn[f"{method}/{name}/{reduction.__name__}"] = reduction(curves[name], axis=0)
    return drawn


def draw(drawn: Curves, path: Path) -> None:
    """Draw the numbers of `bands`: training loss on the left, accuracies on the right."""
    methods = [key.removesuffix("/steps") for key in drawn if key.endswith("/steps")]
    with panels(1, 2, path) as (figure, axes):
        loss, accuracy = axes[0]
        for index, method in enumerate(methods):
            _draw_band(loss, drawn, method, "train_loss", 1.0, label=literal(method), **line_style(index))
            _draw_band(accuracy, drawn, method, "train_accuracy", 100.0, **line_style(index))
            test = {**line_style(index), "linewidth": 1.2}
            _draw_line(accuracy, drawn, method, "test_accuracy", 100.0, **test)
        losses = np.concatenate([drawn[f"{method}/train_loss/mean"] for method in methods])
        losses = losses[np.isfinite(losses)]
        if len(losses) and losses.min() > 0 and losses.max() > 10 * losses.min():
            loss.set_yscale("log")
        loss.set(xlabel="step", ylabel="training loss", title="Training loss")
        tested = any(np.isfinite(drawn[f"{method}/test_accuracy/mean"]).any() for method in methods)
        title = "Accuracy: train (thick, band), test (thin)" if tested else "Training accuracy"
        accuracy.set(xlabel="step", ylabel="accuracy (%)", title=title)
        legend_below(figure, loss)


def _draw_line(axes: Axes, drawn: Curves, method: str, name: str, scale: float, **options: Any) -> None:
    steps, mean = drawn[f"{method}/steps"], scale * drawn[f"{method}/{name}/mean"]
    known = np.isfinite(mean)
    before, after = np.append(False, known[:-1]), np.append(known[1:], False)
    alone = np.flatnonzero(known & ~before & ~after)  # a line has no place for a single point
    axes.plot(steps, np.where(known, mean, np.nan), marker="o" if len(alone) else None, markevery=alone, **options)
    if name == "train_loss" and known.any() and not known[-1]:  # the line ends early: say that it does
        axes.plot(steps[known][-1], mean[known][-1], "X", color=options["color"], markersize=11)


def _draw_band(axes: Axes, drawn: Curves, method: str, name: str, scale: float, **options: Any) -> None:
    low, high = (scale * drawn[f"{method}/{name}/{which}"] for which in ("min", "max"))
    axes.fill_between(drawn[f"{method}/steps"], low, high, color=options["color"], alpha=0.18, linewidth=0)
    _draw_line(axes, drawn, method, name, scale, **options)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder with metrics.csv")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.png", help=f"the picture: {', '.join(FORMATS)}"
    )
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="average over N evaluations")
    args = parser.parse_args(argv)
    if args.smooth < 1:
        parser.error(f"--smooth must be at least 1 evaluation, got {args.smooth}")
    return args


@ending()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its status."""
    args = parse(argv)
    require_picture(args.out)
    require_folder(args.out.parent)
    names = labels(args.runs, suffix=True)
    runs = {name: load_run(folder, smooth=args.smooth) for name, folder in zip(names, args.runs, strict=True)}
    drawn = bands(runs)
    draw(drawn, args.out)
    write_npz(args.out.with_suffix(".npz"), drawn)
    print_table(runs)
    print(f"wrote {args.out} and {args.out.with_suffix('.npz').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
