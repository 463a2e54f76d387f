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
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoints import Checkpoint, load_checkpoint
from command import InputError, labels, require_folder
from problems import Problem, load_problem, to
from spectra import Arrays, Numbers, measure, measure_exact
from spectrum_figure import draw
from spectrum_files import read, write
from spectrum_table import print_table
from torch import nn
from tqdm import tqdm

from gradcond import curvature

MEASURED = ("num_matvecs", "num_probes", "kappa_matvecs", "top", "seed")  # options passed on
OPERATORS: dict[str, Any] = {"hessian": curvature.Hessian, "ggn": curvature.GGN}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "as-is": None}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description="Measure and draw the spectrum of the Hessian at checkpoints.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoints", nargs="*", type=Path, metavar="CKPT", help="file that torch.save wrote")
    add("--problem", type=Path, metavar="FILE.py", help="defines build_model(), load_data(), loss_fn")
    add("--out", type=Path, required=True, metavar="DIR", help="gets spectrum.json, .npz and .png")
    add("--redraw", action="store_true", help="only draw DIR/spectrum.png again from the other two files")
    add("--preconditioned", action="store_true", help="also of P^T H P, P from the saved optimizer")
    add("--operator", choices=OPERATORS, default="hessian", help="the matrix H")
    add("--mode", choices=("eval", "train"), default="eval", help="the mode of the modules, such as BatchNorm")
    add("--dtype", choices=DTYPES, default="as-is", help="of model and data; as-is: as build_model() makes it")
    add("--device", type=_device, default="cpu", help="where to compute, such as cuda")
    add("--num-matvecs", type=_positive, default=80, metavar="M", help="products per probe of the density")
    add("--num-probes", type=_positive, default=5, metavar="K", help="random probes of the density")
    add("--kappa-matvecs", type=_positive, default=200, metavar="M", help="most products for kappa")
    add("--top", type=_positive, default=5, metavar="K", help="eigenvalues at each end")
    add("--exact-below", type=int, default=4000, metavar="N", help="no estimates up to N parameters")
    add("--seed", type=int, default=0, help="of probes, start vectors and shuffled data")
    args = parser.parse_args(argv)
    if args.redraw == bool(args.checkpoints or args.problem):
        parser.error("expected CKPT... and --problem FILE.py, or --redraw and neither")
    if not args.redraw and not (args.checkpoints and args.problem):
        parser.error(f"expected {'--problem FILE.py' if args.checkpoints else 'at least one CKPT'} as well")
    return args


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"expected a device that is here, got {text!r}: {reason}") from error


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
    with tqdm(total=guess, unit="product", desc="spectra", mininterval=0.5) as bar:
        for index, (label, checkpoint) in enumerate(zip(labels(args.checkpoints), checkpoints, strict=True)):
            entry, own = analyse_one(problem, checkpoint, data, args, bar.update)
            report["checkpoints"].append({"label": label, "path": str(checkpoint.path), **entry})
            arrays |= {f"{index}/{name}": values for name, values in own.items()}
            bar.total = round(bar.n * len(checkpoints) / (index + 1))  # what is known by now
            bar.refresh()
    return report, arrays


def prepare(problem: Problem, checkpoint: Checkpoint, args: argparse.Namespace) -> tuple[nn.Module, Any, list[str]]:
    """Return the model at the checkpoint, P when asked for, and notes for the user."""
    model = problem.build_model(seed=args.seed).to(args.device, DTYPES[args.dtype])
    notes = checkpoint.load_into(model)
    model.train(args.mode == "train")
    if not args.preconditioned:
        return model, None, notes
    from gradcond import load_preconditioner

    if checkpoint.optimizer is None:
        raise InputError(
            f"--preconditioned needs the optimizer's state, but {checkpoint.path} holds none; save "
            '{"model": model.state_dict(), "optimizer": optimizer.state_dict()} or leave the option out'
        )
    try:
        return model, load_preconditioner(model, checkpoint.optimizer), notes
    except ValueError as error:
        raise InputError(f"{checkpoint.path}, its optimizer's state: {error}") from error


def analyse_one(
    problem: Problem,
    checkpoint: Checkpoint,
    data: Any,
    args: argparse.Namespace,
    report: Callable[[int], Any],
) -> tuple[Numbers, Arrays]:
    """Return the numbers and arrays of one checkpoint, "VARIANT/NAME"."""
    model, preconditioner, notes = prepare(problem, checkpoint, args)
    try:
        # nothing timed decides how products are computed: the same run gives the same bits
        fixed = {"method": "double_backward", "chunk": 1}
        hessian = OPERATORS[args.operator](model, problem.loss_fn, data, weight_fn=problem.weight_fn, **fixed)
        loss = float(hessian.loss())
    except Exception as error:
        raise InputError(
            f"the model and the data of {problem.path} do not go together: {type(error).__name__}: {error}"
        ) from error
    entry: Numbers = {"parameters": hessian.shape[0], "loss": loss, "notes": notes}
    arrays: Arrays = {}
    exact = hessian.shape[0] <= args.exact_below
    if exact:
        hessian.check_deterministic()
    matrix = hessian.to_dense(progress=report) if exact else hessian
    variants = {"plain": matrix}
    if preconditioner is not None:
        variants["preconditioned"] = curvature.Preconditioned(matrix, preconditioner)
    options = {name: getattr(args, name) for name in MEASURED}
    for variant, operator in variants.items():
        if exact:
            entry[variant], own = measure_exact(operator, top=args.top)
        else:
            entry[variant], own = measure(operator, **options, report=report)
        arrays |= {f"{variant}/{name}": values for name, values in own.items()}
    return entry, arrays


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after telling what is wrong with the input."""
    args = parse(argv)
    try:
        require_folder(args.out)
        report, arrays = read(args.out) if args.redraw else analyse(args)
    except ValueError as error:  # ours, and those of gradcond.curvature
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not args.redraw:
        write(args.out, report, arrays)
        report, arrays = read(args.out)  # as a redrawing will see them
        print_table(report)
    draw(report, arrays, args.out / "spectrum.png")
    print(f"wrote {args.out}/spectrum.{'png' if args.redraw else '{json,npz,png}'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
