"""How the cost of curvature grows, and the spectrum of a network with ten million parameters.

    python analysis/curvature_scale.py [--growth] [--rounds N] [--out DIR]
    python analysis/curvature_scale.py --network resnet18 --images cifar10.npz --samples 2000 --out DIR
    python analysis/curvature_scale.py --network gpt --text FILE... --samples 200 --out DIR

Growth: processor time of a Hessian product against the number of parameters (perceptrons of growing width) and of
batches, and of a density against its Lanczos steps; the exponent is that of a least-squares power law, 1 is linear.
Then what the densities of ten layers take, side by side and one after the other, in times of that of the matrix.
Without --growth the sizes are small, and end in seconds.

Network: the five largest eigenvalues, each certified, and a density, with a progress bar; before them the time they
will take is told. Memory is the rise of the highest resident size over what the program held with network and data
loaded. A product is measured first on two halves of a batch and on two whole ones: what grows is the activations,
what does not is told apart from them. What eigenpairs and density then take beyond activations and basis is given
in gradients, vectors of as many numbers as there are parameters; 3 are the aim. The network is as it is
initialized, or as --checkpoint left it ({"model": state}); --train N steps of SGD over the same data come next, and
then eval mode. --images is an .npz with x_train (N, 32, 32, 3) and y_train, --text any files, read as bytes.
--out writes curvature_scale.json, and .npz with all numbers of the density; until then every product is kept there,
so that a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import load_checkpoint
from command import InputError, command_parser, ending, replacing, require_folder, write_json
from curvature_data import Images, Text, rise
from curvature_growth import growth
from curvature_problems import large_gpt
from spectrum_files import versions
from step_models import resnet18
from torch import Tensor, nn
from tqdm import tqdm
from unfinished import Unfinished, forget

from gradcond import curvature

LOSS = nn.CrossEntropyLoss()
FORMAT = 1  # to be raised when a reader of the old files would misread the new
COMMAND = "curvature_scale"
EIGENPAIRS, EXPECTED = 5, 60  # pairs, and about the products that they take


class Remembered(curvature.Operator):
    """An operator whose products are kept on disk: one with the same vectors is read, not made again."""

    def __init__(self, A: curvature.Operator, unfinished: Unfinished) -> None:
        super().__init__(A.shape[0], A.dtype, A.device, parts=(A,))
        self.unfinished = unfinished

    def check_deterministic(self) -> float:
        """As it was found: two products, which a run that goes on need not make again."""
        return self.unfinished("check", "deterministic", super().check_deterministic)

    def _columns(self, V: Tensor) -> Tensor:
        digest = hashlib.sha256(np.ascontiguousarray(V.cpu()).data).hexdigest()
        return self.unfinished("product", digest[:32], lambda: self.parts[0] @ V)


def build(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The network as training begins, and its data."""
    torch.manual_seed(0)
    model = resnet18(nn.BatchNorm2d, False) if args.network == "resnet18" else large_gpt()
    if args.checkpoint is not None:
        load_checkpoint(args.checkpoint).load_into(model)
    return model, dataset(args, args.batch, args.samples)


def trained(model: nn.Module, data: Any, steps: int) -> dict[str, Tensor]:
    """The network's state after some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    batches = islice((batch for _ in count() for batch in data), steps)
    for inputs, targets in tqdm(batches, desc="training", total=steps, mininterval=1):
        loss = LOSS(model.train()(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def dataset(args: argparse.Namespace, batch: int, samples: int) -> Any:
    """The first samples, at most as many as were asked for."""
    kind, source = (Images, args.images) if args.network == "resnet18" else (Text, args.text)
    return kind(source, min(samples, args.samples), batch)


def network(args: argparse.Namespace) -> dict[str, Any]:
    """Eigenpairs and density of a large network, with their time and memory."""
    model, data = build(args)
    n = sum(p.numel() for p in model.parameters())
    print(f"{args.network}, {n:,} parameters, {len(data)} batches of {args.batch}", flush=True)
    keep = None if args.out is None else unfinished(model, args)
    train = partial(trained, model, data, args.train)
    model.load_state_dict(train() if keep is None else keep("network", "trained", train))
    model.eval()
    found = {"parameters": n, **one_product(model, data, args)}
    memory = partial(_memory, activations=found["activation_bytes"], gradient=4 * n)
    # by the method that a timed choice takes here: a run that goes on must round as the one before it
    H: curvature.Operator = curvature.Hessian(model, LOSS, data, method="double_backward")
    if keep is not None:
        H = Remembered(H, keep)

    def top(progress: Callable[[int], Any]) -> curvature.Eigenpairs:
        options: dict[str, Any] = {"tol": args.tol, "max_vectors": args.vectors, "progress": progress}
        return curvature.eigsh(H, EIGENPAIRS, "LA", **options)

    def density(progress: Callable[[int], Any]) -> curvature.SpectralDensity:
        return curvature.spectral_density(H, args.steps, args.probes, grid="symlog", progress=progress)

    with tqdm(total=EXPECTED, desc="eigenpairs", mininterval=1) as bar:
        pairs, held = rise(partial(top, bar.update))
    names = ("eigenvalues", "residuals", "converged")
    found["eigenpairs"] = {name: getattr(pairs, name).tolist() for name in names}
    vectors = min(pairs.num_matvecs - EIGENPAIRS, args.vectors)
    found["eigenpairs"] |= {"products": pairs.num_matvecs, **memory(vectors, held)}
    del pairs
    with tqdm(total=args.steps * args.probes, desc="density", mininterval=1) as bar:
        spectrum, held = rise(partial(density, bar.update))
    found["density"] = {name: getattr(spectrum, name) for name in ("lambda_min", "lambda_max")}
    found["density"] |= {"quantiles": {q: spectrum.quantile(q) for q in (0.01, 0.1, 0.5, 0.9, 0.99)}}
    found["density"] |= {"products": spectrum.num_matvecs, **memory(args.steps, held)}
    if args.out is not None:
        arrays = {key: getattr(spectrum, key).numpy() for key in ("nodes", "weights", "grid", "density")}
        with replacing(args.out / "curvature_scale.npz") as file:
            np.savez(file, **arrays)
    return found


def unfinished(model: nn.Module, args: argparse.Namespace) -> Unfinished:
    """Where the products of this network with these data and options are kept."""
    sources = [path for path in (args.images, *(args.text or ())) if path is not None]
    options = [args.network, args.batch, args.samples, args.train, args.threads, torch.__version__]
    weights = [p.detach().numpy().tobytes() for p in model.state_dict().values()]
    return Unfinished(args.out, COMMAND, options, *weights, *(path.read_bytes() for path in sources))


def one_product(model: nn.Module, data: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Its time, from that of two batches; the activations, and what else it takes; prints the time of all."""
    n = sum(p.numel() for p in model.parameters())
    v = torch.randn(n, generator=torch.Generator().manual_seed(0))
    halves, two = (dataset(args, batch, 2 * batch) for batch in (args.batch // 2, args.batch))
    H = curvature.Hessian(model, LOSS, two)
    curvature.Hessian(model, LOSS, halves) @ v  # what is made once, before anything is measured
    small = rise(lambda: curvature.Hessian(model, LOSS, halves) @ v)[1]
    whole = rise(lambda: H @ v)[1]
    activations = max(0, 2 * (whole - small))
    start = time.perf_counter()
    H @ v
    seconds = (time.perf_counter() - start) / len(two) * len(data)
    rest, steps = (whole - activations) / (4 * n), args.steps * args.probes
    print(
        f"a product: about {seconds:.1f} s; activations of a batch {activations / 2**20:.0f} MB, the rest of a "
        f"product {rest:.1f} gradients; about {seconds * (EXPECTED + steps) / 60:.0f} minutes for {EXPECTED} and "
        f"{steps}",
        flush=True,
    )
    return {"seconds_per_product": seconds, "activation_bytes": activations, "gradients_of_product": rest}


def _memory(vectors: int, held: int, *, activations: int, gradient: int) -> dict[str, float]:
    beyond = (held - activations) / gradient - vectors
    return {"held_bytes": held, "basis_vectors": vectors, "gradients_beyond_activations_and_basis": beyond}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; bad values end the program with usage and status 2."""
    parser = command_parser(__doc__)
    parser.add_argument("--growth", action="store_true", help="the full sizes of the three sweeps")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the sweeps")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    parser.add_argument("--network", choices=("resnet18", "gpt"), help="instead of the sweeps")
    parser.add_argument("--images", type=Path, help="of --network resnet18, an .npz")
    parser.add_argument("--text", type=Path, nargs="+", help="of --network gpt, files")
    parser.add_argument("--checkpoint", type=Path, help='a file of torch.save({"model": state_dict})')
    parser.add_argument("--train", type=int, default=0, help="steps of SGD before")
    parser.add_argument("--samples", type=int, default=2000, help="images or sequences")
    parser.add_argument("--batch", type=int, default=50, help="of a pass")
    parser.add_argument("--tol", type=float, default=1e-3, help="of the eigenpairs")
    parser.add_argument("--vectors", type=int, default=30, help="of the basis of the eigenpairs")
    parser.add_argument("--steps", type=int, default=40, help="of a probe of the density")
    parser.add_argument("--probes", type=int, default=1, help="of the density")
    parser.add_argument("--out", type=Path, help="folder for curvature_scale.json and .npz")
    args = parser.parse_args(argv)
    if min(args.rounds, args.threads, args.samples, args.steps, args.probes) < 1:
        parser.error("expected --rounds, --threads, --samples, --steps and --probes of at least 1")
    if args.train < 0:
        parser.error(f"expected --train of 0 steps or more, got {args.train}")
    if args.vectors < EIGENPAIRS + 2 or not args.tol > 0:
        parser.error(
            f"expected --vectors of at least {EIGENPAIRS + 2} and --tol above 0, got {args.vectors} and {args.tol}"
        )
    if args.batch < 2:
        parser.error(f"expected --batch of at least 2, got {args.batch}: activations are told by half a batch")
    needed = {"resnet18": "images", "gpt": "text"}.get(args.network)
    if needed is not None and getattr(args, needed) is None:
        parser.error(f"--network {args.network} needs --{needed}")
    return args


@ending("interrupted; a --network with --out goes on from here")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its status."""
    args = parse(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        if args.out is not None:
            require_folder(args.out)
        for path in (args.images, args.checkpoint, *(args.text or ())):
            if path is not None and not path.is_file():
                raise InputError(f"expected a file, got {path}")
        found: dict[str, Any] = network(args) if args.network else growth(args)
    finally:
        torch.set_num_threads(threads)
    for key, value in found.items():
        print(f"{key}: {value}")
    if args.out is not None:
        write_json(
            args.out / "curvature_scale.json", FORMAT, {"settings": vars(args), "versions": versions(), **found}
        )
        forget(args.out, COMMAND)
    return 0


if __name__ == "__main__":
    sys.exit(main())
