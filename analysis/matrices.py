"""The matrix that a command measures: its options, and the operator at a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoints import Checkpoint
from command import InputError, device
from problems import Problem
from torch import Tensor, nn

from gradcond import curvature, load_preconditioner
from gradcond.curvature.products import METHODS

OPERATORS: dict[str, Any] = {
    "hessian": curvature.Hessian,
    "ggn": curvature.GGN,
    "empirical-fisher": curvature.EmpiricalFisher,
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "as-is": None}


def add_options(add: Callable[..., Any]) -> None:
    """Add the options that say which matrix, where and how it is computed, and where the files are."""
    add("checkpoints", nargs="*", type=Path, metavar="CKPT", help="file that torch.save wrote")
    add("--problem", type=Path, metavar="FILE.py", help="defines build_model(), load_data(), loss_fn")
    add("--operator", choices=OPERATORS, default="hessian", help="the matrix H")
    add(
        "--method",
        choices=METHODS,
        default="double_backward",
        help="of its products; auto: the faster one, so that runs may differ in rounding",
    )
    add("--mode", choices=("eval", "train"), default="eval", help="the mode of the modules, such as BatchNorm")
    add("--dtype", choices=DTYPES, default="as-is", help="of model and data; as-is: as build_model() makes it")
    add("--device", type=device, default="cpu", help="where to compute, such as cuda")
    add("--kappa-matvecs", type=positive, default=200, metavar="M", help="most products for kappa")
    add("--exact-below", type=int, default=4000, metavar="N", help="no estimates up to N parameters")
    add("--seed", type=int, default=0, help="of probes, start vectors and shuffled data")
    add("--out", type=Path, required=True, metavar="DIR", help="gets the numbers and the pictures")
    add("--redraw", action="store_true", help="only draw the pictures again from the numbers in DIR")


def parse_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; those of `add_options` are to name checkpoints and a problem, or --redraw alone."""
    args = parser.parse_args(argv)
    if args.redraw == bool(args.checkpoints or args.problem):
        parser.error("expected CKPT... and --problem FILE.py, or --redraw and neither")
    if not args.redraw and not (args.checkpoints and args.problem):
        parser.error(f"expected {'--problem FILE.py' if args.checkpoints else 'at least one CKPT'} as well")
    if args.kappa_matvecs < 5:
        parser.error(f"--kappa-matvecs must be at least 5, got {args.kappa_matvecs}")
    return args


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def model_at(problem: Problem, checkpoint: Checkpoint, args: argparse.Namespace) -> tuple[nn.Module, list[str]]:
    """Return the model as the checkpoint saved it, and notes for the user."""
    model = problem.build_model(seed=args.seed).to(args.device, DTYPES[args.dtype])
    notes = checkpoint.load_into(model)
    return model.train(args.mode == "train"), notes


def saved_preconditioner(model: nn.Module, checkpoint: Checkpoint) -> Any:
    """Return the preconditioner of the wrapped optimizer in the checkpoint.

    Raises:
        InputError: if there is none, or it is of another model.
    """
    try:
        return load_preconditioner(model, checkpoint.optimizer or {})
    except ValueError as error:
        raise InputError(f"{checkpoint.path}, its optimizer's state: {error}") from error


def conditioned(matrix: Any, P: Any) -> Any:
    """Return P^T H P of an operator H, or of one that has been written out; H itself where P is None."""
    if P is None:
        return matrix
    if isinstance(matrix, Tensor):
        half = P.factor_transpose(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
        return P.factor_transpose(half.mT).to(matrix.dtype)  # (P^T H)^T = H P
    return curvature.Preconditioned(matrix, P)


def matrix_at(
    problem: Problem, checkpoint: Checkpoint, model: nn.Module, data: Any, args: argparse.Namespace
) -> tuple[Any, float]:
    """Return the operator over the model's parameters, and the loss.

    Raises:
        InputError: if the model and the data do not go together.
    """
    try:
        operator = OPERATORS[args.operator](
            model, problem.loss_fn, data, weight_fn=problem.weight_fn, method=args.method
        )
        return operator, float(operator.loss())
    except Exception as error:
        raise InputError(
            f"the model at {checkpoint.path} and the data of {problem.path} do not go together: "
            f"{type(error).__name__}: {error}"
        ) from error
