"""Measure what a conditioner adds to a training step, beside what normalization layers add.

    python analysis/step_cost.py [--case a b128 b6 b1 c d] [--rounds N] [--device cuda] [--out DIR]

A step is forward, loss, backward, optimizer.step and zero_grad under SGD. Every round runs each variant once, in
a new order, so that what else the machine does hits all of them; "added" is the median over rounds of the
difference to the plain network in the same round, and a ratio is added by the variant / added by the yardstick
(BatchNorm layers; LayerNorm where there is no batch to speak of), with a bootstrap interval over rounds. On a
CPU it is processor time on one thread, and the C library keeps freed memory: a page that is given back and asked
for again costs as much as the arithmetic on it, at random. "peak" is the most memory alive at once in two steps,
from the model's birth on, as PyTorch's own allocator records it: the same number in every run.

"BNP by hand" is straight-line code for just these perceptrons, see step_floor.py: the least that there can be.

The last table times the conditioning alone, without model and optimizer: GradientCentralization and
MeanShiftRejection beside the two-kernel loop g.sub_(g.mean(dims, keepdim=True)) over the same gradients, on CUDA
also beside one torch._foreach_mul_. --out writes step_cost.json and step_cost.md.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import step_timing
import torch
from command import command_parser, device, ending, replacing, require_folder, write_json
from step_floor import ByHand
from step_models import CASES, Case, perceptron, transformer
from step_timing import Step, compare, interleaved, keep_freed_memory, spread
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from tqdm import tqdm

import gradcond

CHAINS: dict[str, Callable[[], list[gradcond.Conditioner]]] = {
    "BNP": lambda: [gradcond.BNP()],
    "BNP(every=10)": lambda: [gradcond.BNP(every=10)],
    "[BNP, damping]": lambda: [gradcond.BNP(), gradcond.RateDamping()],
    "GradientCentralization": lambda: [gradcond.GradientCentralization()],
    "MeanShiftRejection": lambda: [gradcond.MeanShiftRejection()],
    "WeightStandardization": lambda: [gradcond.WeightStandardization()],
    "[BNP, MSR]": lambda: [gradcond.BNP(), gradcond.MeanShiftRejection()],
}


FORMAT = 1  # to be raised when a reader of the old files would misread the new
BY_HAND = "BNP by hand"


def variants(case: Case) -> list[str]:
    """What can be measured in a case: mean-shift rejection needs kernels of several taps."""
    with torch.device("meta"):
        taps = any(p.dim() > 2 for p in case.build(nn.Identity, True).parameters())
    chains = [name for name in CHAINS if taps or name not in ("MeanShiftRejection", "[BNP, MSR]")]
    return ["plain", *case.norms, *chains, *[BY_HAND] * (case.build is perceptron)]


def build(case: Case, variant: str, args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """One variant's network and optimizer; the network is the same draw in all of them."""
    torch.manual_seed(0)
    make = partial(case.build, attention=args.attention) if case.build is transformer else case.build
    model = make(case.norms.get(variant, nn.Identity), not args.no_bias).to(args.device)
    optimizer: Optimizer = SGD(model.parameters(), lr=1e-6)  # steps that leave the activations as they are
    if variant in CHAINS:
        return model, gradcond.wrap(optimizer, model, CHAINS[variant]())
    if variant == BY_HAND:
        return model, ByHand(optimizer, model, len(case.data(args.device)[0]))
    return model, optimizer


def training_step(case: Case, variant: str, args: argparse.Namespace) -> Callable[[], None]:
    """A function that takes one training step on one random batch."""
    model, optimizer = build(case, variant, args)
    inputs, targets = case.data(args.device)
    loss_fn = nn.CrossEntropyLoss()

    def step() -> None:
        loss_fn(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_bytes(case: Case, variant: str, args: argparse.Namespace) -> int:
    """The most memory alive at once, from the network's birth to the end of its second step."""
    if args.device.type == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step = training_step(case, variant, args)
        step(), step()
        return torch.cuda.max_memory_allocated() - before

    def two_steps() -> None:
        step = training_step(case, variant, args)
        step(), step()

    return step_timing.peak_bytes(two_steps)


def conduct(case: Case, variant: str, args: argparse.Namespace) -> dict[str, str]:
    """Does a step wait for the device, and can it be captured as a CUDA graph? "yes", or what was raised."""
    told = {}
    step = training_step(case, variant, args)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        told["runs without waiting"] = _outcome(step)
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()

    def capture() -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        graph.replay()
        torch.cuda.synchronize()

    told["captured as a graph"] = _outcome(capture)
    return told


def _outcome(step: Step) -> str:
    try:
        step()
    except RuntimeError as error:
        return f"no: {error}".splitlines()[0]
    return "yes"


class _Still(Optimizer):
    """An optimizer that does nothing: what is left of a wrapped step is the conditioning."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""

    step.hooked = True  # type: ignore[attr-defined]  # torch's own part of a step is not timed


def conditioning(case: Case, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Milliseconds that conditioning one step's gradients takes, and loops over the same tensors beside it."""
    found = {}
    for name, first, fraction in (("GradientCentralization", 1, 1.0), ("MeanShiftRejection", 2, 0.9)):
        if name not in variants(case):
            continue
        model, _ = build(case, "plain", args)
        optimizer = gradcond.wrap(_Still(model.parameters()), model, CHAINS[name]())
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        saved = [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
        optimizer.step()
        changed = [g for g, before in saved if not torch.equal(g, before)]
        steps: dict[str, Step] = {
            "conditioner": optimizer.step,
            "two-kernel loop": partial(_subtract_means, changed, first, fraction),
        }
        if args.device.type == "cuda":
            steps["one _foreach_mul_"] = partial(torch._foreach_mul_, changed, 1.0)

        def renew(saved: Sequence[tuple[Tensor, Tensor]] = saved) -> None:
            for gradient, before in saved:
                gradient.copy_(before)

        times = interleaved(steps, **timing(args), title=f"{name} alone", prepare=renew)
        unit = times["two-kernel loop"]

        def ratio(pick: Any, values: np.ndarray = times["conditioner"], unit: np.ndarray = unit) -> float:
            return float(np.median(values[pick]) / np.median(unit[pick]))

        found[name] = {"tensors": len(changed), "ms": {key: float(np.median(t)) for key, t in times.items()}}
        found[name] |= {"ratio": ratio(slice(None)), "ratio_interval": spread(ratio, len(unit))}
    return found


def _subtract_means(gradients: Sequence[Tensor], first: int, fraction: float) -> None:
    """The least that the same arithmetic takes, one tensor after the other."""
    for g in gradients:
        g.sub_(g.mean(tuple(range(first, g.dim())), keepdim=True), alpha=fraction)


def timing(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `interleaved` that are the same for all."""
    return {"rounds": args.rounds, "warm_up": args.warm_up, "device": args.device}


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """All that is told about one case."""
    yardstick = next(iter(case.norms))
    wanted = [v for v in variants(case) if args.variants is None or v in ("plain", yardstick, *args.variants)]
    steps = {name: training_step(case, name, args) for name in wanted}
    table = compare(interleaved(steps, **timing(args), title=case.title), yardstick)
    steps.clear()
    for name in tqdm(wanted, desc="memory", leave=False):
        table[name]["peak_bytes"] = peak_bytes(case, name, args)
        table[name]["peak_added_bytes"] = table[name]["peak_bytes"] - table["plain"]["peak_bytes"]
        if args.device.type == "cuda":
            table[name] |= conduct(case, name, args)
    return {"title": case.title, "yardstick": yardstick, "variants": table, "alone": conditioning(case, args)}


def markdown(found: dict[str, Any]) -> str:
    """The tables, as RESULTS.md shows them."""
    lines = ["; ".join(f"{key}: {value}" for key, value in found["machine"].items()), ""]
    for case in found["cases"].values():
        rows = case["variants"]
        conducts = [key for key in ("runs without waiting", "captured as a graph") if key in rows["plain"]]
        header = [
            "",
            "ms",
            "quartiles",
            "added ms",
            f"added / added by {case['yardstick']}",
            "95 %",
            "peak MB",
            "added MB",
        ]
        lines += [
            f"**{case['title']}**",
            "",
            _row(header + conducts),
            _row(["---", *["---:"] * (7 + len(conducts))]),
        ]
        for name, r in rows.items():
            cells = [name, f"{r['ms']:.3f}", _range(r["ms_quartiles"], 3)]
            plain = name == "plain"
            cells += (
                ["", "", ""]
                if plain
                else [f"{r['added_ms']:.3f}", f"{r['ratio']:.2f}", _range(r["ratio_interval"], 2)]
            )
            cells += [f"{r['peak_bytes'] / 2**20:.2f}", "" if plain else f"{r['peak_added_bytes'] / 2**20:.2f}"]
            lines.append(_row(cells + [r[key] for key in conducts]))
        lines.append("")
        for name, r in case["alone"].items():
            times = ", ".join(f"{key} {ms:.4f} ms" for key, ms in r["ms"].items())
            told = f"conditioner / loop {r['ratio']:.2f} ({_range(r['ratio_interval'], 2)})"
            lines += [f"{name} alone, {r['tensors']} gradients: {times}; {told}", ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _range(ends: tuple[float, float], digits: int) -> str:
    return " to ".join(f"{end:.{digits}f}" for end in ends)


def machine(args: argparse.Namespace, keeps: bool) -> dict[str, str]:
    """What the numbers were taken on."""
    info = Path("/proc/cpuinfo")
    models = [
        line.split(": ")[1]
        for line in (info.read_text() if info.exists() else "").splitlines()
        if "model name" in line
    ]
    cpu = models[0] if models else platform.processor() or platform.machine()
    cuda = args.device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(args.device)
        if cuda
        else f"{cpu}, 1 of {os.cpu_count()} cores, processor time",
        "torch": torch.__version__,
        "gradcond": gradcond.__version__,
        "rounds": f"{args.rounds} after {args.warm_up} of warm-up",
        "freed memory": "kept" if cuda or keeps else "given back (no mallopt)",
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; bad values end the program with usage and status 2."""
    parser = command_parser(__doc__)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["b6"], help="networks")
    parser.add_argument("--variants", nargs="+", help="conditioners and layers to measure; by default all")
    parser.add_argument("--rounds", type=int, default=20, help="rounds that count")
    parser.add_argument("--warm-up", type=int, default=5, help="rounds before them")
    parser.add_argument("--attention", choices=("linear", "mha"), default="linear", help="of the transformer")
    parser.add_argument("--no-bias", action="store_true", help="no biases in the layers before normalization")
    parser.add_argument("--device", type=device, default=torch.device("cpu"), help="where to compute")
    parser.add_argument("--out", type=Path, help="folder for step_cost.json and step_cost.md")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.warm_up < 0:
        parser.error(
            f"expected --rounds of at least 1 and --warm-up of 0 or more, got {args.rounds}, {args.warm_up}"
        )
    known = {name for key in args.case for name in variants(CASES[key])}
    if unknown := set(args.variants or ()) - known:
        parser.error(f"--variants {', '.join(sorted(unknown))}: expected some of {', '.join(sorted(known))}")
    return args


@ending()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its status."""
    args = parse(argv)
    if args.out is not None:
        require_folder(args.out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": machine(args, keep_freed_memory()), "cases": {}}
    for key in args.case:
        found["cases"][key] = measure(CASES[key], args)
        print(markdown({**found, "cases": {key: found["cases"][key]}}), flush=True)
        if args.out is not None:
            write_json(args.out / "step_cost.json", FORMAT, found)
            with replacing(args.out / "step_cost.md") as file:
                file.write(f"{markdown(found)}\n".encode())
    torch.set_num_threads(threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
