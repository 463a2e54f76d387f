"""Print condition numbers at checkpoints, before and after preconditioning, per layer and per output unit.

    python analysis/condition_number.py CKPT... --problem FILE.py --out DIR [--operator ggn] [...]
    python analysis/condition_number.py --redraw --out DIR

FILE.py defines build_model(), load_data() and loss_fn (see problems.py); a CKPT is what torch.save wrote (see
checkpoints.py). Each row is a part of the parameters and each column a matrix on it: H itself; P^T H P for the
conditioners in the checkpoint's optimizer state; and for the diagonal that Adam, AdamW, RMSprop or Adagrad
divide by, if it holds one. The last column is the floor of BNP, see input_correlation.py. What cannot be told
from zero is never a number: "> x, unresolved below y". DIR gets, each whole or not at all:

condition.json  "format": 1; settings, versions; per checkpoint label, path, loss, variants (the columns) and
                "blocks": name, kind, parameters, kappa by variant (see gradcond.curvature.ConditionNumber;
                "exact": by all eigenvalues), "units" (count, measured, and the same by variant as lists, with min,
                median and max of kappa as [at least, at most]) and "input_correlation". The first block is all
                parameters. Strict JSON: NaN and infinity are null.
condition.png   kappa by layer, drawn from this file alone.

A run that was interrupted or killed goes on when the same command is given again, with the same outcome: what it
has measured waits in DIR/unfinished until all is written. --redraw prints the table and draws it from the file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints import Checkpoint, load_checkpoint
from command import command_parser, ending, labels, read_json, write_json
from condition_figure import draw
from condition_table import print_table
from conditions import Conditions
from input_correlation import LARGEST, condition, too_wide, watching
from layer_blocks import LayerBlock, find_blocks
from matrices import (
    DTYPES,
    add_options,
    matrix_at,
    model_at,
    parse_options,
    positive,
    saved_preconditioner,
)
from problems import Problem, load_problem, to
from redrawing import measure_and_show
from spectra import Numbers
from spectrum_files import versions
from torch import nn
from tqdm import tqdm
from unfinished import INTERRUPTED, Unfinished, identity

from gradcond import curvature

FORMAT = 1  # to be raised when a reader of the old files would misread the new
SQUARES = {"exp_avg_sq", "square_avg", "sum"}  # what adaptive optimizers keep


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = command_parser(__doc__)
    add_options(parser.add_argument)
    parser.add_argument(
        "--units", type=positive, default=8, metavar="K", help="output units of a layer where not all are exact"
    )
    return parse_options(parser, argv)


def analyse(args: argparse.Namespace) -> Numbers:
    """Return the report of all checkpoints; inputs are checked before the first product."""
    problem = load_problem(args.problem)
    checkpoints = [load_checkpoint(path) for path in args.checkpoints]
    for checkpoint in checkpoints:
        prepare(problem, checkpoint, args)
    data = [to(batch, args.device, DTYPES[args.dtype]) for batch in problem.load_data(seed=args.seed)]
    report: Numbers = {"settings": vars(args), "checkpoints": []}
    with tqdm(unit="product", desc="condition numbers", mininterval=0.5) as bar:
        for label, checkpoint in zip(labels(args.checkpoints), checkpoints, strict=True):
            left = len(checkpoints) - len(report["checkpoints"])
            entry = analyse_one(problem, checkpoint, data, args, bar, left)
            report["checkpoints"].append({"label": label, "path": str(checkpoint.path), **entry})
        bar.total = bar.n  # what is known by now
    return report


def prepare(
    problem: Problem, checkpoint: Checkpoint, args: argparse.Namespace
) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """Return the model at the checkpoint, the factor P of each variant, and notes for the user."""
    model, notes = model_at(problem, checkpoint, args)
    state, factors = checkpoint.optimizer or {}, dict[str, Any](plain=None)
    if "gradcond" in state:
        P = saved_preconditioner(model, checkpoint)
        factors[", ".join(conditioner["name"] for conditioner in state["gradcond"]["chain"]) or "conditioned"] = P
    if any(SQUARES & own.keys() for own in state.get("state", {}).values()):
        try:
            diagonal = curvature.optimizer_factor(state, model)
        except ValueError as error:
            notes.append(f"{checkpoint.path}: the diagonal of its optimizer is left out: {error}")
        else:
            factors[diagonal.kind] = diagonal
            if diagonal.without_state:
                notes.append(f"{checkpoint.path}: no step yet of {', '.join(diagonal.without_state)}")
    if len(factors) == 1:
        notes.append(f"{checkpoint.path} holds no conditioner and no adaptive optimizer: before is all there is")
    return model, factors, notes


def analyse_one(
    problem: Problem, checkpoint: Checkpoint, data: Any, args: argparse.Namespace, bar: tqdm, left: int
) -> Numbers:
    """Return the numbers of one checkpoint, the first of those left."""
    model, factors, notes = prepare(problem, checkpoint, args)
    matrix, loss = matrix_at(problem, checkpoint, model, data, args)
    blocks = find_blocks(matrix.model)
    wide = [block.name for block in blocks if block.layer is not None and too_wide(block.layer)]
    if wide:
        notes.append(f"{', '.join(wide)}: no correlation of more than {LARGEST} inputs")
    bar.total = bar.n + left * _products(blocks, len(factors), args)
    bar.refresh()
    unfinished = Unfinished(args.out, "condition", *identity(problem, checkpoint, model, loss, args))
    conditions = Conditions(
        matrix,
        factors,
        unfinished,
        exact_below=args.exact_below,
        max_matvecs=args.kappa_matvecs,
        seed=args.seed,
        report=bar.update,
    )
    whole = {"name": "all", "kind": "", "parameters": matrix.shape[0], "kappa": conditions.of_all()}
    entries = [whole | {"units": None, "input_correlation": None}]
    correlations = unfinished("inputs", "correlation", lambda: _correlations(matrix, blocks))
    numbers = conditions.of_blocks({f"{place}": block.index for place, block in enumerate(blocks)})
    for place, (block, correlation) in enumerate(zip(blocks, correlations, strict=True)):
        bar.set_postfix_str(block.name)
        entries.append(
            {
                "name": block.name,
                "kind": block.kind,
                "parameters": len(block.index),
                "kappa": numbers[f"{place}"],
                "units": conditions.of_units(f"{place}", block, args.units) if block.units else None,
                "input_correlation": correlation,
            }
        )
    unfinished.tell(checkpoint.path)
    return {
        "parameters": matrix.shape[0],
        "loss": loss,
        "notes": notes,
        "variants": list(factors),
        "blocks": entries,
    }


def _correlations(matrix: Any, blocks: Sequence[LayerBlock]) -> list[Numbers | None]:
    """Return what is told of the inputs of each block, from one pass over the data."""
    with watching(blocks) as seen:
        matrix.loss()
    return [condition(seen[b.name]) if b.layer is not None and b.name in seen else None for b in blocks]


def _products(blocks: Sequence[LayerBlock], variants: int, args: argparse.Namespace) -> int:
    """Guess how many products a checkpoint takes."""
    n = sum(len(block.index) for block in blocks)
    if n <= args.exact_below:
        return n
    sizes = [n, *(len(block.index) for block in blocks)]
    sizes += [len(unit) for block in blocks for unit in block.units[: args.units]]
    return variants * sum(size if size <= args.kappa_matvecs else 2 * args.kappa_matvecs for size in sizes)


def write(folder: Path, report: Numbers) -> None:
    """Write the file, whole or not at all."""
    write_json(folder / "condition.json", FORMAT, {"versions": versions(), **report})


def show(args: argparse.Namespace) -> None:
    """Print and draw what the file holds."""
    report = read_json(args.out / "condition.json", FORMAT)
    print_table(report)
    draw(report, args.out / "condition.png")
    print(f"wrote {args.out}/condition.{'png' if args.redraw else '{json,png}'}")


@ending(INTERRUPTED)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its status."""
    args = parse(argv)
    measure_and_show(args, "condition", lambda: write(args.out, analyse(args)), lambda: show(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
