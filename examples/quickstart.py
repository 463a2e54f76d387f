"""Train on the digits with and without gradient conditioning, then measure what it did to the Hessian.

    python examples/quickstart.py              # train, measure spectra, draw curves, print a table
    python examples/quickstart.py --tune       # first search the learning rates again, one grid for all methods

Every method trains on mini-batches of 8 for three epochs, with two seeds, without momentum and at a rate that falls
linearly to zero: the same network from the same start, its twin with BatchNorm layers, or a convolutional one. The
first rate is the one of the grid whose training loss, averaged over the run and the seeds, is lowest. Then the
analysis commands read what training left behind, runs/quickstart/METHOD/metrics.csv and *.pt.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import digits
import digits_batchnorm
import digits_conv
import torch
from torch import Tensor, nn
from tqdm import tqdm

import gradcond
from gradcond import (
    BNP,
    Conditioner,
    GradientCentralization,
    MeanShiftRejection,
    RateDamping,
    WeightStandardization,
)

EXAMPLES = Path(__file__).resolve().parent
sys.path.insert(0, str(EXAMPLES.parent / "analysis"))

BATCH, STEPS, EVALUATE_EVERY, SEEDS = 8, 537, 5, (0, 1)
GRID = tuple(2.0**k for k in range(-13, 5))


@dataclass(frozen=True)
class Method:
    """A problem file, a chain of conditioners, and the best rate of GRID as `--tune` found it."""

    problem: Any
    lr: float
    chain: Callable[[], list[Conditioner]] = list

    @property
    def file(self) -> str:
        """The problem file's path."""
        return str(EXAMPLES / f"{self.problem.__name__}.py")


# rates: python examples/quickstart.py --tune
METHODS = {
    "SGD": Method(digits, 2.0**-6),
    "BatchNorm": Method(digits_batchnorm, 2.0**-1),
    "BNP": Method(digits, 2.0**2, lambda: [BNP()]),
    "BNP+damping": Method(digits, 2.0**4, lambda: [BNP(), RateDamping()]),
    "GC": Method(digits, 2.0**-5, lambda: [GradientCentralization()]),
    "WS": Method(digits, 2.0**-10, lambda: [WeightStandardization()]),
    "BNP+GC": Method(digits, 2.0**2, lambda: [BNP(), GradientCentralization()]),
    "conv-SGD": Method(digits_conv, 2.0**-5),
    "conv-BNP+MSR": Method(digits_conv, 2.0**1, lambda: [BNP(), MeanShiftRejection()]),
}


@dataclass(frozen=True)
class Row:
    """One evaluation, a row of metrics.csv."""

    seed: int
    step: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float


def batches(x: Tensor, y: Tensor, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Mini-batches, reshuffled every epoch, the same for every method."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(x) // BATCH
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(x), generator=generator)
        index = order[step % per_epoch * BATCH :][:BATCH]
        yield x[index], y[index]


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Loss and accuracy in eval mode."""
    model.eval()
    output = model(x)
    model.train()
    return digits.loss_fn(output, y).item(), (output.argmax(1) == y).double().mean().item()


def train(method: Method, lr: float, seed: int, steps: int, folder: Path | None = None) -> Iterator[Row]:
    """Trains one network and yields its evaluations; saves checkpoints after each half into the folder."""
    x, y, x_test, y_test = digits.split()
    torch.manual_seed(seed)
    model = method.problem.build_model()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    if chain := method.chain():
        optimizer = gradcond.wrap(optimizer, model, chain)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step, (inputs, targets) in enumerate(batches(x, y, seed, steps), start=1):
        optimizer.zero_grad()
        loss = digits.loss_fn(model(inputs), targets)
        if not math.isfinite(loss.item()):
            raise ValueError(
                f"expected a finite loss, got {loss.item()} at step {step}; lower the learning rate {lr}"
            )
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % EVALUATE_EVERY == 0 or step == steps:
            yield Row(seed, step, *evaluate(model, x, y), evaluate(model, x_test, y_test)[1])
        if folder and step in (steps // 2, steps):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seed": seed}
            file = folder / f"seed{seed}_step{step:04d}.pt"
            torch.save(state, file.with_suffix(".tmp"))
            os.replace(file.with_suffix(".tmp"), file)


def train_one(name: str, lr: float, out: Path, steps: int) -> list[Row]:
    """Trains a method with every seed and returns its evaluations; writes metrics.csv as training goes."""
    torch.set_num_threads(1)
    folder, rows = out / name, []
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, Row.__dataclass_fields__, lineterminator="\n")
        writer.writeheader()
        for seed in SEEDS:
            for row in train(METHODS[name], lr, seed, steps, folder):
                rows.append(row)
                writer.writerow(vars(row))
                file.flush()
    return rows


def tune(methods: dict[str, Method], steps: int) -> dict[str, Method]:
    """The methods with the best rate of the grid for each; prints the search."""
    best = {}
    for name, method in tqdm(methods.items(), desc="tuning", unit="method"):
        score = {}
        for lr in GRID:
            try:
                losses = [row.train_loss for seed in SEEDS for row in train(method, lr, seed, steps)]
                score[lr] = statistics.mean(losses)
            except ValueError:  # diverged: not finite
                score[lr] = math.inf
        lr = min(score, key=score.__getitem__)
        best[name] = Method(method.problem, lr, method.chain)
        tqdm.write(f"{name}: 2**{math.log2(lr):.0f} of 2**{math.log2(GRID[0]):.0f}..2**{math.log2(GRID[-1]):.0f}")
        tqdm.write("   " + "  ".join(f"{math.log2(lr):.0f}: {loss:.3g}" for lr, loss in score.items()))
    return best


def for_each(pool: Executor, work: Callable[..., Any], names: Sequence[str], *arguments: Any) -> dict[str, Any]:
    """What work(name, *arguments) returns for each name, by the processes of a pool, with a progress bar."""
    done = pool.map(work, names, *arguments)
    label = work.__name__.removesuffix("_one")
    return dict(tqdm(zip(names, done, strict=True), total=len(names), desc=label, unit="method"))


def measure_one(name: str, out: Path, steps: int) -> dict[str, Any]:
    """Measures the Hessian by analysis/hessian_spectrum.py on the last checkpoint of a method's first seed."""
    import hessian_spectrum

    torch.set_num_threads(1)
    method, folder = METHODS[name], out / name
    checkpoint = folder / f"seed{SEEDS[0]}_step{steps:04d}.pt"
    command = [str(checkpoint), "--problem", method.file, "--out", str(folder), "--method", "auto"]
    command += ["--preconditioned"] if method.chain() else []
    with (folder / "spectrum.txt").open("w") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            status = hessian_spectrum.main(command)
    if status:
        raise RuntimeError(f"the spectrum of {name} failed; {folder / 'spectrum.txt'} says why")
    return json.loads((folder / "spectrum.json").read_text())["checkpoints"][0]


def steps_to_90(rows: list[Row], seed: int) -> float:
    """The first evaluated step with 90 % training accuracy; infinite when there is none."""
    return min((row.step for row in rows if row.seed == seed and row.train_accuracy >= 0.9), default=math.inf)


def print_table(methods: dict[str, Method], rows: dict[str, list[Row]], spectra: dict[str, dict[str, Any]]) -> None:
    """Prints one line per method; spectra are of the first seed, the rest is the mean over seeds."""
    print(f"\n{'':14}{'':>9}{'test':>8}{'steps to':>12}{'lambda_max':>21}{'kappa':>22}{'lambda_max/median':>21}")
    columns = f"{'before':>12}{'after':>9}{'before':>12}{'after':>10}{'before':>12}{'after':>9}"
    print(f"{'method':14}{'rate':>9}{'acc. %':>8}{'90 % train':>12}{columns}")
    for name, method in methods.items():
        last = [[row for row in rows[name] if row.seed == seed][-1] for seed in SEEDS]
        accuracy = 100 * statistics.mean(row.test_accuracy for row in last)
        to_90 = statistics.mean(steps_to_90(rows[name], seed) for seed in SEEDS)
        cells = [f"{name:14}{method.lr:9.2g}{accuracy:8.1f}{to_90:12.4g}"]
        for column, widths in ((lambda_max, (12, 9)), (kappa, (12, 10)), (ratio, (12, 9))):
            for variant, width in zip(("plain", "preconditioned"), widths, strict=True):
                numbers = spectra[name].get(variant)
                cells.append(f"{'-' if numbers is None else column(numbers):>{width}}")
        print("".join(cells))
    print("before: of H; after: of P^T H P, what training saw. kappa > x: it exceeds x, the smallest eigenvalues")
    print("cannot be told from zero in float32. median: of |lambda| above that noise floor.")


def lambda_max(numbers: dict[str, Any]) -> str:
    """The largest eigenvalue."""
    return f"{numbers['condition']['lambda_max']:.3g}"


def kappa(numbers: dict[str, Any]) -> str:
    """The condition number, or the largest value that it is certified to exceed."""
    condition = numbers["condition"]
    if condition["resolved"] and condition["converged"]:
        return f"{condition['kappa']:.3g}"
    return f">{condition['kappa_lower_bound']:.2g}"


def ratio(numbers: dict[str, Any]) -> str:
    """The largest eigenvalue over the median magnitude of those above the noise floor."""
    return f"{numbers['bulk']['ratio']:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the whole comparison; returns the exit status."""
    parser = argparse.ArgumentParser(description="Gradient conditioning on scikit-learn's digits, end to end.")
    parser.add_argument("--tune", action="store_true", help="search the learning rates again before training")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for everything written")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each run")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="a part of the table")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, got {args.steps}")
    start = time.time()
    torch.set_num_threads(1)  # the networks are small: a second thread costs more than it does
    methods = {name: METHODS[name] for name in args.methods}
    if args.tune:
        methods = tune(methods, args.steps)
    names, rates = list(methods), [method.lr for method in methods.values()]
    same = [args.out] * len(names), [args.steps] * len(names)
    with ProcessPoolExecutor(max_workers=2, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = for_each(pool, train_one, names, rates, *same)
        spectra = for_each(pool, measure_one, names, *same)

    import convergence

    picture = args.out / "convergence.png"
    with (args.out / "convergence.txt").open("w") as log, contextlib.redirect_stdout(log):
        if convergence.main([*(str(args.out / name) for name in methods), "--out", str(picture)]):
            raise SystemExit("drawing the curves failed; see the error above")
    print_table(methods, rows, spectra)
    print(f"\ncurves:   {picture}")
    for name in methods:
        print(f"spectrum: {args.out / name / 'spectrum.png'}")
    print(f"{time.time() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
