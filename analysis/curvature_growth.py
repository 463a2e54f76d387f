"""How the time of products, of densities, and of what is asked of blocks grows with the problem."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from step_timing import interleaved
from torch import Tensor, nn

from gradcond import curvature

LOSS = nn.CrossEntropyLoss()


def perceptron(width: int, depth: int = 4) -> nn.Module:
    """Square layers and an output."""
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def random_data(width: int, batches: int, rows: int) -> list[tuple[Tensor, Tensor]]:
    """Batches for a perceptron."""
    torch.manual_seed(0)
    return [(torch.randn(rows, width), torch.randint(0, 10, (rows,))) for _ in range(batches)]


def hessian(width: int, batches: int, rows: int) -> curvature.Hessian:
    """Of a perceptron on random data."""
    data = random_data(width, batches, rows)
    return curvature.Hessian(perceptron(width), LOSS, data)


def growth(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Milliseconds against parameters, batches and steps, each with the exponent of its power law."""
    large = args.growth
    widths = (256, 362, 512, 724, 1024) if large else (64, 91, 128)
    batches = (2, 4, 8, 16, 32) if large else (2, 4, 8)
    steps = (20, 40, 80, 160) if large else (5, 10, 20)
    found, width = {}, 256 if large else 64

    def product(H: curvature.Hessian) -> Callable[[], Tensor]:
        v = torch.ones(H.shape[0])
        return lambda: H @ v

    by_width = {H.shape[0]: product(H) for H in (hessian(size, 2, 128) for size in widths)}
    found["parameters"] = _law(by_width, args)
    found["batches"] = _law({number: product(hessian(width, number, 128)) for number in batches}, args)
    H = hessian(width, 2, 128)
    runs = {number: partial(curvature.spectral_density, H, number, 1) for number in steps}
    found["steps"] = _law(runs, args)
    found["ten blocks"] = ten_blocks(args)
    return found


def ten_blocks(args: argparse.Namespace) -> dict[str, Any]:
    """What the densities of ten layers take, in times of that of the whole matrix, by kind and batches."""
    found, width = {}, 512 if args.growth else 64
    for kind in (curvature.Hessian, curvature.GGN):
        for batches in (1, 4):
            data = random_data(width, batches, width // 2)
            A = kind(perceptron(width, 9), LOSS, data, method="double_backward")
            A.check_deterministic()
            layers = {f"{2 * i}": A.block(f"{2 * i}.*") for i in range(10)}
            density = partial(_density, steps=10 if args.growth else 3)
            runs: dict[str, Callable[[], object]] = {
                "whole": partial(density, A),
                "side by side": partial(curvature.each_block, layers, density),
                "one after the other": partial(_densities, layers.values(), density),
            }
            title = f"{kind.__name__}, {batches} batch{'es' * (batches > 1)}"
            times = _interleaved(runs, args, title)
            unit = np.median(times.pop("whole"))
            found[title] = {name: float(np.median(ms) / unit) for name, ms in times.items()}
    return found


def _density(A: curvature.Operator, steps: int) -> curvature.SpectralDensity:
    return curvature.spectral_density(A, steps, 1)


def _densities(blocks: Iterable[curvature.Operator], density: Callable[..., Any]) -> list[Any]:
    return [density(B) for B in blocks]


def _interleaved(runs: Mapping[str, Callable[[], object]], args: argparse.Namespace, title: str) -> Any:
    return interleaved(runs, rounds=args.rounds, warm_up=2, device=torch.device("cpu"), title=title)


def _law(runs: Mapping[int, Callable[[], object]], args: argparse.Namespace) -> dict[str, Any]:
    times = _interleaved({str(size): run for size, run in runs.items()}, args, ", ".join(map(str, runs)))
    sizes, ms = np.array(list(runs)), np.array([np.median(values) for values in times.values()])
    exponent, _ = np.polyfit(np.log(sizes), np.log(ms), 1)
    return {"sizes": sizes.tolist(), "ms": ms.tolist(), "exponent": float(exponent)}
