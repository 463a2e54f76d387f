"""Time, memory, products and error of our curvature engine and of four other libraries, on the same problems.

    python analysis/curvature_cost.py [--problem tiny mlp resnet gpt spectrum] [--rounds N] [--out DIR]

A library that is not installed is named as missing; CONTRIBUTING.md tells how to install all four. Every round runs
each library once, in a new order; times are processor time on one thread, medians and quartiles over rounds. "of
the best peer" compares with the quickest (or smallest) of the peers whose error is at most twice ours or 1e-5, with
a bootstrap interval over rounds: below 1 ours is less. "peak" is the most memory alive at once, of PyTorch's and
NumPy's own records, in preparing a run and running it; the network and its data are there before.

- a product: with one vector and with eight, on one batch and on two. An operator that has been made is ready:
  graphs that a library keeps are kept, and count in its peak. Error: of the product, by double backward in float64.
- eigenvalues: the five largest in magnitude of the Hessian, to 1e-6. Error: over the largest; of ARPACK at full
  precision on a float64 copy. hessian-eigenthings has no stop rule, and gets the least steps that pass its test.
- density: 5 x 80 products on a matrix of known spectrum (bulk and outliers 20 and 10). Error: the Wasserstein
  distance of the nodes to the eigenvalues over the range, mean over seeds; "curve", that of the smooth density.
- trace: 96 products. Error: root mean square over seeds, relative to the trace.

All networks are in eval mode; attention runs by its math kernel, as the others have none that can be differentiated
twice. --out writes curvature_cost.json and curvature_cost.md.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import curvature_contestants as contestants
import curvature_peers
import numpy as np
import torch
from command import command_parser, ending, replacing, require_folder, write_json
from curvature_contestants import OURS, Entries, Run, quietly
from curvature_problems import PROBLEMS, Problem, known_spectrum, reference
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import eigsh as arpack
from scipy.stats import wasserstein_distance
from step_timing import interleaved, keep_freed_memory, peak_bytes, quartiles, spread
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import gradcond

FORMAT = 1  # to be raised when a reader of the old files would misread the new
LOSS = nn.CrossEntropyLoss()
KEPT = 2048  # bytes: smaller ones are Python's own objects
Errors = Callable[[Run], dict[str, float]]  # a run -> its errors by name, the first one decides


def tables(key: str, found: list[str], args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All tables of one problem, by title."""
    if key == "spectrum":
        A, values = known_spectrum()
        entries = contestants.densities(A, found)
        title = "density of an 800 x 800 matrix"
        return {title: measure(title, entries, partial(density_errors, values.numpy(), args.seeds), args)}
    problem = PROBLEMS[key]
    made = products(problem, found, args)
    model, data = problem.model(), problem.data(1)
    if problem.eigenvalues:
        title, exact = f"{problem.title}: 5 eigenvalues", exact_eigenvalues(problem)

        def off(run: Run) -> dict[str, float]:
            values = torch.sort(run(0).answer.double()).values
            return {"error": float((values - exact).abs().max() / exact.abs().max())}

        made[title] = measure(title, contestants.eigenvalues(model, LOSS, data, found), off, args)
    if problem.trace:
        title, product = f"{problem.title}: trace", reference("Hessian", model, data)
        n = sum(p.numel() for p in model.parameters())
        trace = sum(float(product(unit)[i].detach()) for i, unit in enumerate(torch.eye(n)))

        def misses(run: Run) -> dict[str, float]:
            estimates = np.array([run(seed).answer for seed in range(args.seeds)])
            return {"error": float(np.sqrt(np.mean((estimates / trace - 1) ** 2)))}

        made[title] = measure(title, contestants.traces(model, LOSS, data, found, 96), misses, args)
    return made


def products(problem: Problem, found: list[str], args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """A table per operator, number of columns and number of batches."""
    made = {}
    for kind in ("Hessian", "GGN"):
        peers = [peer for peer in found if (peer, kind) != ("PyHessian", "GGN")]
        for batches, columns in ((1, 1), (1, 8), (2, 1)):
            model, data = problem.model(), problem.data(batches)
            n = sum(p.numel() for p in model.parameters())
            V = torch.randn((n, columns), generator=torch.Generator().manual_seed(2))
            exact = reference(kind, model, data)(V[:, 0]).detach()
            V = V[:, 0].contiguous() if columns == 1 else V

            def off(run: Run, exact: torch.Tensor = exact) -> dict[str, float]:
                first = run(0).answer.detach().reshape(len(exact), -1)[:, 0].double()
                return {"error": float((first - exact).norm() / exact.norm())}

            entries = contestants.products(kind, model, LOSS, data, V, peers)
            title = f"{problem.title}: {kind}, {_count(columns, 'column')}, {_count(batches, 'batch')}"
            made[title] = measure(title, entries, off, args)
    return made


def exact_eigenvalues(problem: Problem) -> torch.Tensor:
    """The five largest in magnitude, ascending, by ARPACK at full precision in float64."""
    product = reference("Hessian", problem.model(), problem.data(1))
    n = sum(p.numel() for p in problem.model().parameters())
    operator = LinearOperator(
        (n, n), matvec=lambda v: product(torch.from_numpy(v)).detach().numpy(), dtype=np.float64
    )
    values = arpack(operator, 5, which="LM", tol=0, return_eigenvectors=False, v0=np.ones(n))
    return torch.from_numpy(values).sort().values


def density_errors(values: np.ndarray, seeds: int, run: Run) -> dict[str, float]:
    """Wasserstein distances over the range, means over seeds."""
    nodes, curves = [], []
    for seed in range(seeds):
        theta, weights, grid, density = (part.numpy() for part in run(seed).answer)
        nodes.append(wasserstein_distance(values, theta, None, weights))
        mass = np.clip(density * np.gradient(grid), 0, None)
        curves.append(wasserstein_distance(values, grid, None, mass))
    width = values.max() - values.min()
    return {"error": float(np.mean(nodes) / width), "curve": float(np.mean(curves) / width)}


def measure(title: str, entries: Entries, errors: Errors, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per library: what it found, what it took; or what it raised."""
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    for name, prepare in tqdm(entries.items(), desc=title, leave=False):
        try:
            run = quietly(prepare())
            rows[name] = {"name": name, "products": run(0).products, **errors(run)}
            runs[name] = run
        except Exception as error:  # another library's failure is a result, ours is not
            if name == OURS:
                raise
            rows[name] = {"name": name, "raises": f"{type(error).__name__}: {error}".splitlines()[0][:100]}
    times = interleaved(
        {name: partial(run, 0) for name, run in runs.items()},
        rounds=args.rounds,
        warm_up=1,
        device=torch.device("cpu"),
        title=title,
    )
    runs.clear()
    for name, ms in times.items():
        rows[name] |= {"ms": float(np.median(ms)), "ms_quartiles": quartiles(ms)}
        again = 2 if rows[name]["products"] <= 8 else 1  # what is kept after the first is seen by the second
        rows[name]["peak_bytes"] = peak(partial(_prepared, entries[name]), again)
    _compare(rows, times)
    return list(rows.values())


def _prepared(prepare: Callable[[], Run]) -> Run:
    return quietly(prepare())


def peak(prepare: Callable[[], Run], repeat: int) -> int:
    """The most memory alive at once in preparing a run and running it."""

    def action() -> Run:
        run = prepare()
        for _ in range(repeat):
            run(0)
        return run

    tracemalloc.start()
    run = action()
    most = tracemalloc.get_traced_memory()[1]
    sizes = [trace.size for trace in tracemalloc.take_snapshot().traces]
    tracemalloc.stop()
    del run
    # Python's own objects are some hundred kB, each of them small: arrays, and bytes that are kept, are larger
    return peak_bytes(action) + (most if most > 2**20 else sum(size for size in sizes if size > KEPT))


def _compare(rows: dict[str, dict[str, Any]], times: dict[str, np.ndarray]) -> None:
    """Our time and memory over those of the best peer that is as accurate."""
    allowed = max(2 * rows[OURS]["error"], 1e-5)
    peers = [name for name in times if not name.startswith(OURS) and rows[name]["error"] <= allowed]
    if not peers:
        return
    quickest = min(peers, key=lambda name: float(np.median(times[name])))
    smallest = min(peers, key=lambda name: int(rows[name]["peak_bytes"]))

    def ratio(pick: Any) -> float:
        return float(np.median(times[OURS][pick]) / np.median(times[quickest][pick]))

    rows[OURS]["time_ratio"], rows[OURS]["time_peer"] = ratio(slice(None)), quickest
    rows[OURS]["time_interval"] = spread(ratio, len(times[OURS]))
    rows[OURS]["peak_ratio"] = rows[OURS]["peak_bytes"] / max(1, rows[smallest]["peak_bytes"])
    rows[OURS]["peak_peer"] = smallest


def markdown(found: dict[str, Any]) -> str:
    """The tables, as RESULTS.md shows them."""
    lines = ["; ".join(f"{key}: {value}" for key, value in found["machine"].items()), ""]
    for title, rows in found["tables"].items():
        curve = "curve" in rows[0]
        header = ["", "ms", "quartiles", "peak MB", "products", "error", *(["curve"] if curve else [])]
        lines += [f"**{title}**", "", _row([*header, "of the best peer"])]
        lines.append(_row(["---", *["---:"] * (len(header) - 1), "---"]))
        for r in rows:
            lines.append(_row([r["name"], *_cells(r, curve), _verdict(r)]))
        lines.append("")
    return "\n".join(lines)


def summary(found: dict[str, Any]) -> str:
    """One row per table: what we take of the best peer."""
    lines = [_row(["", "ms", "time", "95 %", "of", "memory", "of"])]
    lines.append(_row(["---", *["---:"] * 3, "---", "---:", "---"]))
    for title, rows in found["tables"].items():
        r = rows[0]
        if "time_ratio" in r:
            low, high = r["time_interval"]
            time = [f"{r['time_ratio']:.2f}", f"{low:.2f} to {high:.2f}", r["time_peer"]]
            cells = [title, f"{r['ms']:.2f}", *time, f"{r['peak_ratio']:.2f}", r["peak_peer"]]
            lines.append(_row(cells))
    return "\n".join(lines)


def _cells(r: dict[str, Any], curve: bool) -> list[str]:
    if "raises" in r:
        return [""] * (6 if curve else 5)
    low, high = r["ms_quartiles"]
    cells = [f"{r['ms']:.2f}", f"{low:.2f} to {high:.2f}", f"{r['peak_bytes'] / 2**20:.2f}", str(r["products"])]
    return [*cells, f"{r['error']:.1e}", *([f"{r['curve']:.1e}"] if curve else [])]


def _verdict(r: dict[str, Any]) -> str:
    if "raises" in r:
        return f"raises {r['raises']}"
    if "time_ratio" not in r:
        return ""
    low, high = r["time_interval"]
    time = f"time {r['time_ratio']:.2f} ({low:.2f} to {high:.2f}, {r['time_peer']})"
    return f"{time}, memory {r['peak_ratio']:.2f} ({r['peak_peer']})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('ch') else 's'}"


def machine(found: list[str], args: argparse.Namespace, keeps: bool) -> dict[str, str]:
    """What the numbers were taken on."""
    missing = [name for name in curvature_peers.MODULES if name not in found]
    return {
        "date": date.today().isoformat(),
        "device": f"CPU, 1 of {os.cpu_count()} cores, processor time",
        "torch": torch.__version__,
        "gradcond": gradcond.__version__,
        "beside": ", ".join(found) or "none",
        **({"missing": ", ".join(missing)} if missing else {}),
        "rounds": f"{args.rounds} after 1 of warm-up",
        "seeds": str(args.seeds),
        "freed memory": "kept" if keeps else "given back (no mallopt)",
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; bad values end the program with usage and status 2."""
    parser = command_parser(__doc__)
    names = (*PROBLEMS, "spectrum")
    parser.add_argument(
        "--problem", nargs="+", choices=names, default=["tiny"], help="networks, and a matrix of known spectrum"
    )
    parser.add_argument("--peers", nargs="*", choices=curvature_peers.MODULES, help="by default all installed")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of a mean error")
    parser.add_argument("--out", type=Path, help="folder for curvature_cost.json and curvature_cost.md")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.seeds < 1:
        parser.error(f"expected --rounds and --seeds of at least 1, got {args.rounds} and {args.seeds}")
    return args


@ending()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its status."""
    args = parse(argv)
    if args.out is not None:
        require_folder(args.out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # the many collections between measurements look at what the measurements make
    peers = [name for name in curvature_peers.installed() if args.peers is None or name in args.peers]
    found: dict[str, Any] = {"machine": machine(peers, args, keep_freed_memory()), "tables": {}}
    for key in args.problem:
        with sdpa_kernel(SDPBackend.MATH):
            made = tables(key, peers, args)
        found["tables"] |= made
        print(markdown({**found, "tables": made}), flush=True)
        if args.out is not None:
            write_json(args.out / "curvature_cost.json", FORMAT, found)
            with replacing(args.out / "curvature_cost.md") as file:
                file.write(f"{markdown(found)}\n".encode())
    if peers:
        print(summary(found))
    gc.unfreeze()
    torch.set_num_threads(threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
