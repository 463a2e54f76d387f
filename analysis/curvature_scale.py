"""How the cost of curvature grows, and the spectrum of a network with ten million parameters.

    python analysis/curvature_scale.py [--growth] [--rounds N] [--out DIR]
    python analysis/curvature_scale.py --network resnet18 --images cifar10.npz --samples 2000 --out DIR
    python analysis/curvature_scale.py --network gpt --text FILE... --samples 200 --out DIR

Growth: processor time of a Hessian product against the number of parameters (perceptrons of growing width) and of
batches, and of a density against its Lanczos steps; the exponent is that of a least-squares power law, 1 is linear.
Without --growth the sizes are small, and end in seconds.

Network: the five largest eigenvalues, each certified, and a density, with a progress bar; before them the time they
will take is told. Memory is the rise of the highest resident size over what the program held with network and data
loaded. A product is measured first on half a batch and on a whole one: what grows is the activations, what does not
is told apart from them. What eigenpairs and density then take beyond activations and basis is given in gradients,
vectors of as many numbers as there are parameters; 3 are the aim. The network is in eval mode as it is initialized,
or as --checkpoint left it ({"model": state}); --images is an .npz with x_train (N, 32, 32, 3) and y_train, --text
any files, read as bytes. --out writes curvature_scale.json, and .npz with all numbers of the density.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import InputError, replacing, require_folder, write_json
from curvature_problems import large_gpt
from step_models import resnet18
from step_timing import interleaved
from torch import Tensor, nn
from tqdm import tqdm

from gradcond import curvature

LOSS = nn.CrossEntropyLoss()
EIGENPAIRS, EXPECTED = 5, 60  # pairs, and about the products that they take


def perceptron(width: int) -> nn.Module:
    """Four square layers and an output."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def hessian(width: int, batches: int, rows: int) -> curvature.Hessian:
    """Of a perceptron on random data."""
    torch.manual_seed(0)
    data = [(torch.randn(rows, width), torch.randint(0, 10, (rows,))) for _ in range(batches)]
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
    return found


def _law(runs: Mapping[int, Callable[[], object]], args: argparse.Namespace) -> dict[str, Any]:
    times = interleaved(
        {str(size): run for size, run in runs.items()},
        rounds=args.rounds,
        warm_up=2,
        device=torch.device("cpu"),
        title=", ".join(map(str, runs)),
    )
    sizes, ms = np.array(list(runs)), np.array([np.median(values) for values in times.values()])
    exponent, _ = np.polyfit(np.log(sizes), np.log(ms), 1)
    return {"sizes": sizes.tolist(), "ms": ms.tolist(), "exponent": float(exponent)}


class Images:
    """Batches of CIFAR images, made floating-point one at a time."""

    def __init__(self, path: Path, samples: int, batch: int) -> None:
        with np.load(path) as file:
            x, y = file["x_train"][:samples], file["y_train"][:samples]
        self.x, self.y, self.batch = torch.from_numpy(x), torch.from_numpy(y).flatten().long(), batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(self.x.split(self.batch), self.y.split(self.batch), strict=True):
            yield (x.permute(0, 3, 1, 2).float() / 255 - 0.47) / 0.25, y

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.batch)


class Text:
    """Batches of byte sequences, and the bytes after them."""

    def __init__(self, paths: Sequence[Path], samples: int, batch: int, tokens: int = 256) -> None:
        text = torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in paths)), dtype=torch.uint8)
        rows = min(samples, (len(text) - 1) // tokens)
        if rows == 0:
            raise InputError(f"--text: expected at least {tokens + 1} bytes, got {len(text)}")
        self.x, self.y = (text[i : i + rows * tokens].view(rows, tokens) for i in (0, 1))
        self.batch = batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(self.x.split(self.batch), self.y.split(self.batch), strict=True):
            yield x.long(), y.long().flatten()

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.batch)


def highest_resident() -> int:
    """The most bytes this process has held since `reset_resident`, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def reset_resident() -> None:
    """Start over from what is held now, what has been freed given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def rise(action: Callable[[], Any]) -> tuple[Any, int]:
    """What an action returns, and how far the resident size rose in it."""
    reset_resident()
    before = highest_resident()
    result = action()
    return result, highest_resident() - before


def build(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The network in eval mode, and its data."""
    torch.manual_seed(0)
    model = resnet18(nn.BatchNorm2d, False) if args.network == "resnet18" else large_gpt()
    if args.checkpoint is not None:
        model.load_state_dict(torch.load(args.checkpoint, weights_only=True)["model"])
    return model.eval(), dataset(args, args.batch)


def dataset(args: argparse.Namespace, batch: int) -> Any:
    """The batches that were asked for."""
    if args.network == "resnet18":
        return Images(args.images, args.samples, batch)
    return Text(args.text, args.samples, batch)


def network(args: argparse.Namespace) -> dict[str, Any]:
    """Eigenpairs and density of a large network, with their time and memory."""
    model, data = build(args)
    n = sum(p.numel() for p in model.parameters())
    print(f"{args.network}, {n:,} parameters, {len(data)} batches of {args.batch}", flush=True)
    first, v = next(iter(data)), torch.randn(n, generator=torch.Generator().manual_seed(0))
    half = [tuple(part[: max(1, len(part) // 2)] for part in first)]

    def multiply(batches: Any) -> Tensor:
        return curvature.Hessian(model, LOSS, batches) @ v

    multiply(half)  # what is made once, before anything is measured
    small, whole = (rise(partial(multiply, batches))[1] for batches in (half, [first]))
    gradient, activations = 4 * n, max(0, 2 * (whole - small))
    start = time.perf_counter()
    multiply(data)
    seconds, steps = time.perf_counter() - start, args.steps * args.probes
    print(
        f"a product: {seconds:.1f} s; activations of a batch {activations / 2**20:.0f} MB, the rest of a product "
        f"{(whole - activations) / gradient:.1f} gradients; about {seconds * (EXPECTED + steps) / 60:.0f} minutes "
        f"for {EXPECTED} and {steps} products",
        flush=True,
    )
    found: dict[str, Any] = {"parameters": n, "seconds_per_product": seconds, "activation_bytes": activations}
    options: dict[str, Any] = {"max_vectors": args.vectors}

    def top(progress: Callable[[int], Any]) -> curvature.Eigenpairs:
        H = curvature.Hessian(model, LOSS, data)
        return curvature.eigsh(H, EIGENPAIRS, "LA", tol=args.tol, progress=progress, **options)

    def density(progress: Callable[[int], Any]) -> curvature.SpectralDensity:
        H = curvature.Hessian(model, LOSS, data)
        return curvature.spectral_density(H, args.steps, args.probes, grid="symlog", progress=progress)

    with tqdm(total=EXPECTED, desc="eigenpairs", mininterval=1) as bar:
        pairs, held = rise(partial(top, bar.update))
    found["eigenpairs"] = {
        "eigenvalues": pairs.eigenvalues.tolist(),
        "residuals": pairs.residuals.tolist(),
        "converged": pairs.converged.tolist(),
        "products": pairs.num_matvecs,
        **_memory(min(pairs.num_matvecs, args.vectors), held, activations, gradient),
    }
    del pairs
    with tqdm(total=steps, desc="density", mininterval=1) as bar:
        spectrum, held = rise(partial(density, bar.update))
    found["density"] = {
        "lambda_min": spectrum.lambda_min,
        "lambda_max": spectrum.lambda_max,
        "quantiles": {q: spectrum.quantile(q) for q in (0.01, 0.1, 0.5, 0.9, 0.99)},
        "products": spectrum.num_matvecs,
        **_memory(args.steps, held, activations, gradient),
    }
    if args.out is not None:
        arrays = {key: getattr(spectrum, key).numpy() for key in ("nodes", "weights", "grid", "density")}
        with replacing(args.out / "curvature_scale.npz") as file:
            np.savez(file, **arrays)
    return found


def _memory(vectors: int, held: int, activations: int, gradient: int) -> dict[str, float]:
    beyond = (held - activations) / gradient - vectors
    return {"held_bytes": held, "basis_vectors": vectors, "gradients_beyond_activations_and_basis": beyond}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; bad values end the program with usage and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--growth", action="store_true", help="the full sizes of the three sweeps")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the sweeps (default: 3)")
    parser.add_argument("--network", choices=("resnet18", "gpt"), help="instead of the sweeps")
    parser.add_argument("--images", type=Path, help="of --network resnet18, an .npz")
    parser.add_argument("--text", type=Path, nargs="+", help="of --network gpt, files")
    parser.add_argument("--checkpoint", type=Path, help='a file of torch.save({"model": state_dict})')
    parser.add_argument("--samples", type=int, default=2000, help="images or sequences (default: 2000)")
    parser.add_argument("--batch", type=int, default=50, help="of a pass (default: 50)")
    parser.add_argument("--tol", type=float, default=1e-3, help="of the eigenpairs (default: 1e-3)")
    parser.add_argument("--vectors", type=int, default=30, help="of the basis of the eigenpairs (default: 30)")
    parser.add_argument("--steps", type=int, default=40, help="of a probe of the density (default: 40)")
    parser.add_argument("--probes", type=int, default=1, help="of the density (default: 1)")
    parser.add_argument("--out", type=Path, help="folder for curvature_scale.json and .npz")
    args = parser.parse_args(argv)
    if min(args.rounds, args.samples, args.batch, args.steps, args.probes) < 1:
        parser.error("expected --rounds, --samples, --batch, --steps and --probes of at least 1")
    needed = {"resnet18": "images", "gpt": "text"}.get(args.network)
    if needed is not None and getattr(args, needed) is None:
        parser.error(f"--network {args.network} needs --{needed}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after telling what is wrong with the input."""
    args = parse(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if args.out is not None:
            require_folder(args.out)
        for path in (args.images, args.checkpoint, *(args.text or ())):
            if path is not None and not path.is_file():
                raise InputError(f"expected a file, got {path}")
        found: dict[str, Any] = network(args) if args.network else growth(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    for key, value in found.items():
        print(f"{key}: {value}")
    if args.out is not None:
        write_json(args.out / "curvature_scale.json", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
