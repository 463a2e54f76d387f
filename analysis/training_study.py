"""Train one network with many methods, learning rates and seeds, and print what each one reached.

    python analysis/training_study.py --task cifar10 --data cifar10.npz --batch 8 --steps 1200 --momentum 0.9 \
        --methods SGD BatchNorm BNP --rates -10 -4 --seeds 0 1 2 --out runs/study

Rates are powers of two. Every run is one line of OUT/results.jsonl; what is there already is not run again, so
that a study can be interrupted, split and extended. The tables cover all lines of the file:

- loss: mean loss of the mini-batches of the last tenth of the steps, each before its own step (so BatchNorm by
  its batch statistics); "set loss" and "test acc." are of the final model in eval mode, on all training and test
  images.
- best rate: of the rates at which no seed failed, the one with the best mean over seeds, by --select. A seed has
  failed if its loss is not finite or no better than guessing.
- stable: the rates around the one of least (set) loss whose mean is at most 5 % above it, no seed failing, and
  their range in octaves, factors of two. "<" and ">" mark a range that reaches the end of the grid.
- Rates with fewer seeds than others of the same method are left out.

The networks: mlp, (inputs)-100-100-100-10; conv (for cifar10), 3x3 kernels with 16-16-32-32-64-64 channels, 2x2
max-pooling after the second and the fourth, global average, linear head. Both have ReLU, He's initialization, and
normalization layers (GroupNorm with 4 groups) in front of the ReLU. Pixels are in [0, 1], color channels
standardized. The task "scales" is the digits with each pixel in units of its own, over two powers of ten.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import InputError, command_parser, ending, read_npz, require_folder
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import gradcond

CLASSES = 10
TOLERANCE = 1.05  # of the least loss, for the stable range

Data = tuple[Tensor, Tensor, Tensor, Tensor]  # training images and labels, test images and labels
Norm = Callable[[int], nn.Module]  # a normalization layer for so many channels
Result = dict[str, Any]  # one line of results.jsonl


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm for any number of positions."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Takes all."""


@dataclass(frozen=True)
class Method:
    """Layers to add, or conditioners to wrap the optimizer with."""

    norm: Norm | None = None
    chain: Callable[[], list[gradcond.Conditioner]] = list


METHODS = {
    "SGD": Method(),
    "BatchNorm": Method(norm=BatchNorm),
    "GroupNorm": Method(norm=lambda channels: nn.GroupNorm(4, channels)),
    "LayerNorm": Method(norm=lambda channels: nn.GroupNorm(1, channels)),
    "MSR": Method(chain=lambda: [gradcond.MeanShiftRejection()]),
    "BNP": Method(chain=lambda: [gradcond.BNP()]),
    "BNP+MSR": Method(chain=lambda: [gradcond.BNP(), gradcond.MeanShiftRejection()]),
    "BNP+clip": Method(chain=lambda: [gradcond.BNP(), gradcond.NormClipping()]),
    "BNP+MSR+clip": Method(chain=lambda: [gradcond.BNP(), gradcond.MeanShiftRejection(), gradcond.NormClipping()]),
    "BNP(eps_rel=.1)": Method(chain=lambda: [gradcond.BNP(eps_rel=0.1)]),
    "BNP(eps_rel=.1)+damp": Method(chain=lambda: [gradcond.BNP(eps_rel=0.1), gradcond.RateDamping()]),
    "BNP(eps_rel=.1)+MSR+damp": Method(
        chain=lambda: [gradcond.BNP(eps_rel=0.1), gradcond.MeanShiftRejection(), gradcond.RateDamping()]
    ),
    "damp": Method(chain=lambda: [gradcond.RateDamping()]),
    "MSR+damp": Method(chain=lambda: [gradcond.MeanShiftRejection(), gradcond.RateDamping()]),
    "BNP+damp": Method(chain=lambda: [gradcond.BNP(), gradcond.RateDamping()]),
    "BNP+MSR+damp": Method(chain=lambda: [gradcond.BNP(), gradcond.MeanShiftRejection(), gradcond.RateDamping()]),
}


def mlp(inputs: int, norm: Norm | None, widths: Sequence[int] = (100, 100, 100)) -> nn.Sequential:
    """Return a dense network."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in widths:
        layers += [nn.Linear(inputs, width), *([norm(width)] if norm else []), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, CLASSES))


def conv(norm: Norm | None, channels: Sequence[int] = (16, 16, 32, 32, 64, 64)) -> nn.Sequential:
    """Return a convolutional network."""
    layers: list[nn.Module] = []
    before = 3
    for i, after in enumerate(channels):
        layers += [nn.Conv2d(before, after, 3, padding=1), *([norm(after)] if norm else []), nn.ReLU()]
        if i in (1, 3):
            layers.append(nn.MaxPool2d(2))
        before = after
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, CLASSES))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def build_model(task: str, norm: Norm | None, data: Data) -> nn.Sequential:
    """Return a task's network with He's initialization."""
    model = conv(norm) if task == "cifar10" else mlp(data[0][0].numel(), norm)
    for module in model:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return model


def load_data(task: str, path: Path | None) -> Data:
    """Return a task's images and labels, its own or those of an .npz in Keras layout.

    Raises:
        InputError: if there is no such file, or it has not the four arrays, or not of this task.
    """
    if task in ("digits", "scales"):
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        images = torch.tensor(x / 16, dtype=torch.float32)
        if task == "scales":
            images *= 10 ** (2 * torch.rand(64, generator=torch.Generator().manual_seed(0)) - 1)
            images /= images.std()
        labels = torch.tensor(y)
        return images[:1437], labels[:1437], images[1437:], labels[1437:]
    if path is None or not path.is_file():
        raise InputError(f"--task {task} needs --data FILE.npz, the data set in Keras layout; got {path}")
    arrays = read_npz(path, ("x_train", "y_train", "x_test", "y_test"))
    x, y, x_test, y_test = map(torch.from_numpy, arrays)
    if task == "cifar10" and x.shape[1:] != (32, 32, 3):
        raise InputError(f"--task cifar10: expected images of 32 x 32 x 3, got {tuple(x.shape)} in {path}")
    x, x_test = x.float() / 255, x_test.float() / 255
    if x.dim() == 4:
        std, mean = torch.std_mean(x, (0, 1, 2))
        # a view with the strides of channels_last
        x, x_test = (((images - mean) / std).permute(0, 3, 1, 2) for images in (x, x_test))
    return x, y.long().flatten(), x_test, y_test.long().flatten()


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return mean loss and accuracy in eval mode."""
    model.eval()
    outputs = torch.cat([model(batch) for batch in images.split(500)])
    model.train()
    return cross_entropy(outputs, labels).item(), (outputs.argmax(1) == labels).double().mean().item()


def train(args: argparse.Namespace, data: Data, method: Method, rate: float, seed: int) -> Result:
    """Train once, and return what was reached; a run that is no longer finite ends early."""
    torch.manual_seed(seed)
    model = build_model(args.task, method.norm, data)
    images, labels = data[:2]
    optimizer = gradcond.wrap(
        torch.optim.SGD(model.parameters(), lr=rate, momentum=args.momentum), model, method.chain()
    )
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-args.steps * args.batch // len(images))
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(epochs)])
    losses = []
    for chosen in order[: args.steps * args.batch].split(args.batch):
        optimizer.zero_grad()
        loss = cross_entropy(model(images[chosen]), labels[chosen])
        if not loss.isfinite():
            return {"loss": None, "set_loss": None, "test_accuracy": None}
        loss.backward()
        try:
            optimizer.step()
        except ValueError:  # gradients that are not finite
            return {"loss": None, "set_loss": None, "test_accuracy": None}
        losses.append(loss.item())
    set_loss = evaluate(model, images, labels)[0]
    return {
        "loss": float(np.mean(losses[-(-9 * len(losses) // 10) :])),
        "set_loss": set_loss if math.isfinite(set_loss) else None,
        "test_accuracy": evaluate(model, *data[2:])[1],
    }


def failed(result: Result) -> bool:
    """Did a run diverge, or learn nothing?"""
    return any(result[key] is None or result[key] >= math.log(CLASSES) for key in ("loss", "set_loss"))


def best_rate(runs: dict[float, list[Result]], select: str) -> float | None:
    """Return the rate with the best mean of `select` among those without a failed seed."""
    sign = -1 if select.endswith("loss") else 1
    sound = {rate: sign * mean(results, select) for rate, results in runs.items() if not any(map(failed, results))}
    return max(sound, key=lambda rate: sound[rate]) if sound else None


def stable_rates(runs: dict[float, list[Result]], best: float, key: str) -> list[float]:
    """Return the rates, connected to the best one, whose `key` is at most 5 % above its, without a failed seed."""
    rates = sorted(runs)
    limit = TOLERANCE * mean(runs[best], key)
    good = [not any(map(failed, runs[rate])) and mean(runs[rate], key) <= limit for rate in rates]
    low = high = rates.index(best)
    while low > 0 and good[low - 1]:
        low -= 1
    while high + 1 < len(rates) and good[high + 1]:
        high += 1
    return rates[low : high + 1]


def mean(results: Sequence[Result], key: str) -> float:
    """Return the mean over seeds."""
    return float(np.mean([result[key] for result in results]))


def spread(results: Sequence[Result], key: str, digits: int = 3) -> str:
    """Return mean +- standard deviation over seeds as text."""
    values = [result[key] for result in results]
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def print_tables(results: Sequence[Result], select: str) -> None:
    """Print one markdown table for every setting, one row per method."""
    settings = ("task", "batch", "steps", "momentum")
    for setting in dict.fromkeys(tuple(result[key] for key in settings) for result in results):
        group = [result for result in results if tuple(result[key] for key in settings) == setting]
        print("\n{} at batch {}, {} steps, momentum {}".format(*setting))
        print("| method | best rate | seeds | loss | set loss | test acc. | stable, loss | stable, set loss |")
        print("|---|---|---|---|---|---|---|---|")
        for method in dict.fromkeys(result["method"] for result in group):
            runs: dict[float, list[Result]] = {}
            for result in group:
                if result["method"] == method:
                    runs.setdefault(result["rate"], []).append(result)
            print(f"| {method} | {' | '.join(_cells(runs, select))} |")


def _cells(runs: dict[float, list[Result]], select: str) -> list[str]:
    seeds = max(map(len, runs.values()))
    runs = {rate: results for rate, results in runs.items() if len(results) == seeds}
    best = best_rate(runs, select)
    if best is None:
        return ["none: every rate has a failed seed", *[""] * 6]
    numbers = [spread(runs[best], key) for key in ("loss", "set_loss", "test_accuracy")]
    return [_power(best), str(seeds), *numbers, _range(runs, "loss"), _range(runs, "set_loss")]


def _range(runs: dict[float, list[Result]], key: str) -> str:
    best = best_rate(runs, key)
    assert best is not None  # the same seeds have failed, whatever the key
    stable = stable_rates(runs, best, key)
    below = "<" if stable[0] == min(runs) else ""
    above = ">" if stable[-1] == max(runs) else ""
    octaves = math.log2(stable[-1] / stable[0])
    return f"{below}{_power(stable[0])} to {above}{_power(stable[-1])}: {octaves:g} oct."


def _power(rate: float) -> str:
    return f"2^{math.log2(rate):g}"


def read(path: Path) -> list[Result]:
    """Return the lines of a results file, none if there is no file yet.

    Raises:
        InputError: if one of them is damaged, as a full disk leaves it.
    """
    results = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            results.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"line {number} of {path} is damaged ({error}); delete it") from error
    return results


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = command_parser(__doc__)
    parser.add_argument("--task", choices=("digits", "scales", "mnist", "cifar10"), default="digits", help="data")
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="of mnist and cifar10, in Keras layout")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["SGD", "BatchNorm", "BNP"],
        metavar="M",
        help=f"of {', '.join(METHODS)}",
    )
    parser.add_argument(
        "--rates", nargs=2, type=int, default=(-6, -4), metavar=("LOW", "HIGH"), help="as powers of two"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every Nth power only")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="of start and batches")
    parser.add_argument("--batch", type=int, default=8, help="images of a step")
    parser.add_argument("--steps", type=int, default=150, help="of a run")
    parser.add_argument("--momentum", type=float, default=0.0, help="of SGD")
    parser.add_argument(
        "--select", choices=("loss", "set_loss", "test_accuracy"), default="loss", help="by what a rate is best"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.jsonl; without it none is kept")
    args = parser.parse_args(argv)
    if min(args.batch, args.steps, args.every) < 1:
        parser.error("--batch, --steps and --every must be at least 1")
    if args.rates[0] > args.rates[1]:
        parser.error(f"--rates takes the lowest power first, got {args.rates[0]} {args.rates[1]}")
    return args


@ending("interrupted; with --out the same command goes on from here")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its status."""
    args = parse(argv)
    if args.out is not None:
        require_folder(args.out)
        args.out.mkdir(parents=True, exist_ok=True)
    data = load_data(args.task, args.data)
    results = read(args.out / "results.jsonl") if args.out else []
    setting = {key: getattr(args, key) for key in ("task", "batch", "steps", "momentum")}
    wanted = [
        {**setting, "method": method, "rate": 2.0**power, "seed": seed}
        for seed in args.seeds
        for method in args.methods
        for power in range(args.rates[0], args.rates[1] + 1, args.every)
    ]
    missing = [run for run in wanted if not any(run.items() <= result.items() for result in results)]
    for run in tqdm(missing, desc=args.task, disable=None):
        result = {**run, **train(args, data, METHODS[run["method"]], run["rate"], run["seed"])}
        results.append(result)
        if args.out is not None:
            with (args.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")
    print_tables(results, args.select)
    return 0


if __name__ == "__main__":
    sys.exit(main())
