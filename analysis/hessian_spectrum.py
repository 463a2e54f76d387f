"""Measure the Hessian's spectrum at checkpoints, plain and preconditioned, and draw it.

    python analysis/hessian_spectrum.py CKPT... --problem FILE.py --out DIR [--preconditioned] [...]
    python analysis/hessian_spectrum.py --redraw --out DIR

FILE.py defines build_model(), load_data() and loss_fn (see problems.py); a CKPT is what torch.save wrote (see
checkpoints.py). With --preconditioned, P comes from the state of a gradcond optimizer in the checkpoint, and
the spectrum of P^T H P is measured beside that of H. DIR gets, each whole or not at all:

spectrum.json   "format": 1; settings, versions; per checkpoint label, path, loss, and for "plain" and
                "preconditioned" the extreme eigenvalues with residuals and converged, trace, condition
                number, bulk and number of products. Strict JSON: NaN and infinity are null.
spectrum.npz    "INDEX/VARIANT/NAME", where NAME is one of eigenvalues (ascending, both ends), residuals,
                nodes, weights, grid, density, cdf, std_error (of the density) as in
                gradcond.curvature.SpectralDensity.
spectrum.png    drawn from these two files alone.
trajectory.png  of two checkpoints or more: how the ends and the condition number move, in the order given.

Before the first estimate of a checkpoint, five products show whether its matrix is repeatable and symmetric, and
what the noise, a product and the basis will be. The searches for extreme eigenvalues start from those of the
checkpoint before, so give checkpoints in the order of training. A run that was interrupted or killed goes on when
the same command is given again, with the same outcome: what it has measured waits in DIR/unfinished until all is
written.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from checkpoints import Checkpoint, load_checkpoint
from command import InputError, command_parser, ending, labels
from matrices import (
    DTYPES,
    add_options,
    conditioned,
    matrix_at,
    model_at,
    parse_options,
    positive,
    saved_preconditioner,
)
from problems import Problem, load_problem, to
from redrawing import measure_and_show
from spectra import Arrays, Numbers, measure, measure_exact
from spectrum_figure import draw
from spectrum_files import read, write
from spectrum_table import VARIANTS, print_table
from torch import nn
from tqdm import tqdm
from trajectory_figure import draw_trajectory
from unfinished import INTERRUPTED, Unfinished, identity

from gradcond import curvature

MEASURED = ("num_matvecs", "num_probes", "kappa_matvecs", "top", "seed")  # options passed on


@dataclass
class Before:
    """What a checkpoint takes over from the one before it."""

    pairs: dict[str, dict[str, curvature.Eigenpairs]]  # by variant and end: where the searches start
    key: str = ""  # of its results, as those of the next depend on them


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add_options(add)
    add("--preconditioned", action="store_true", help="also of P^T H P, P from the saved optimizer")
    add("--num-matvecs", type=positive, default=80, metavar="M", help="products per probe of the density")
    add("--num-probes", type=positive, default=5, metavar="K", help="random probes of the density")
    add("--top", type=positive, default=5, metavar="K", help="eigenvalues at each end")
    return parse_options(parser, argv)


def analyse(args: argparse.Namespace) -> tuple[Numbers, Arrays]:
    """Return the report and the arrays of all checkpoints; inputs are checked before the first product."""
    problem = load_problem(args.problem)
    checkpoints = [load_checkpoint(path) for path in args.checkpoints]
    for checkpoint in checkpoints:
        prepare(problem, checkpoint, args)
    dtype = DTYPES[args.dtype]
    data = [to(batch, args.device, dtype) for batch in problem.load_data(seed=args.seed)]
    report: Numbers = {"settings": vars(args), "checkpoints": []}
    arrays: Arrays = {}
    variants = 1 + args.preconditioned
    # two eigsh and a trace of about a hundred products each, the condition number and the density
    guess = len(checkpoints) * variants * (300 + args.kappa_matvecs + args.num_matvecs * args.num_probes)
    before = Before({variant: {} for variant in VARIANTS})
    with tqdm(total=guess, unit="product", desc="spectra", mininterval=0.5) as bar:
        for index, (label, checkpoint) in enumerate(zip(labels(args.checkpoints), checkpoints, strict=True)):
            entry, own = analyse_one(problem, checkpoint, data, args, before, bar.update)
            report["checkpoints"].append({"label": label, "path": str(checkpoint.path), **entry})
            arrays |= {f"{index}/{name}": values for name, values in own.items()}
            bar.total = round(bar.n * len(checkpoints) / (index + 1))  # what is known by now
            bar.refresh()
    return report, arrays


def prepare(problem: Problem, checkpoint: Checkpoint, args: argparse.Namespace) -> tuple[nn.Module, Any, list[str]]:
    """Return the model at the checkpoint, P when asked for, and notes for the user."""
    model, notes = model_at(problem, checkpoint, args)
    if not args.preconditioned:
        return model, None, notes
    if checkpoint.optimizer is None:
        raise InputError(
            f"--preconditioned needs the optimizer's state, but {checkpoint.path} holds none; save "
            '{"model": model.state_dict(), "optimizer": optimizer.state_dict()} or leave the option out'
        )
    return model, saved_preconditioner(model, checkpoint), notes


def analyse_one(
    problem: Problem,
    checkpoint: Checkpoint,
    data: Any,
    args: argparse.Namespace,
    before: Before,
    report: Callable[[int], Any],
) -> tuple[Numbers, Arrays]:
    """Return the numbers and arrays of one checkpoint, "VARIANT/NAME"."""
    model, preconditioner, notes = prepare(problem, checkpoint, args)
    hessian, loss = matrix_at(problem, checkpoint, model, data, args)
    entry: Numbers = {"parameters": hessian.shape[0], "loss": loss, "notes": notes}
    arrays: Arrays = {}
    unfinished = Unfinished(args.out, "spectrum", before.key, *identity(problem, checkpoint, model, loss, args))
    before.key = unfinished.key

    @functools.cache
    def matrix() -> Any:
        if hessian.shape[0] > args.exact_below:
            return hessian
        hessian.check_deterministic()
        return hessian.to_dense(progress=report)

    if hessian.shape[0] > args.exact_below:
        tqdm.write(f"{checkpoint.path}: {curvature.preflight(hessian, args.kappa_matvecs)}", file=sys.stderr)
    factors = {"plain": None} if preconditioner is None else {"plain": None, "preconditioned": preconditioner}
    for variant, factor in factors.items():
        keep = functools.partial(unfinished, variant)
        operator = functools.partial(lambda P: conditioned(matrix(), P), factor)
        if hessian.shape[0] <= args.exact_below:
            entry[variant], own = measure_exact(operator, keep, top=args.top)
        else:
            options = {name: getattr(args, name) for name in MEASURED}
            entry[variant], own = measure(operator(), keep, before.pairs[variant], **options, report=report)
        arrays |= {f"{variant}/{name}": values for name, values in own.items()}
    unfinished.tell(checkpoint.path)
    return entry, arrays


def show(args: argparse.Namespace) -> None:
    """Print and draw what the files hold."""
    report, arrays = read(args.out)
    print_table(report)
    draw(report, arrays, args.out / "spectrum.png")
    print(f"wrote {args.out}/spectrum.{'png' if args.redraw else '{json,npz,png}'}")
    if len(report["checkpoints"]) > 1:
        draw_trajectory(report, args.out / "trajectory.png")
        print(f"wrote {args.out}/trajectory.png")
    else:  # one of an earlier run would not be of these checkpoints
        (args.out / "trajectory.png").unlink(missing_ok=True)


@ending(INTERRUPTED)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its status."""
    args = parse(argv)
    measure_and_show(args, "spectrum", lambda: write(args.out, *analyse(args)), lambda: show(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
