"""One task each, as every library does it: eigenvalues, densities and traces, for `curvature_cost.py`."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import curvature_peers as peers
import torch
from curvature_problems import Matrix
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import eigsh as arpack
from torch import Tensor, nn

from gradcond import curvature

OURS = "gradcond"


class Outcome(NamedTuple):
    """What a run found, and what it took."""

    answer: Any
    products: int


Run = Callable[[int], Outcome]  # seed -> outcome
Entries = Mapping[str, Callable[[], Run]]  # library -> what prepares a run


def products(
    kind: str, model: nn.Module, loss_fn: nn.Module, data: peers.Batches, V: Tensor, found: list[str]
) -> Entries:
    """Ready to multiply: what is kept from one product to the next is kept."""

    def ours() -> Run:
        operator = getattr(curvature, kind)(model, loss_fn, data)
        return lambda seed: Outcome(operator @ V, 1 if V.ndim == 1 else V.shape[1])

    def theirs(peer: str) -> Run:
        for p in model.parameters():
            p.grad = None
        product = peers.product(peer, kind, model, loss_fn, data)
        return lambda seed: Outcome(product(V), 1 if V.ndim == 1 else V.shape[1])

    return {OURS: ours, **{peer: functools.partial(theirs, peer) for peer in found}}


def eigenvalues(
    model: nn.Module, loss_fn: nn.Module, data: peers.Batches, found: list[str], *, k: int = 5, tol: float = 1e-6
) -> Entries:
    """The k largest eigenvalues in magnitude of the Hessian."""

    def ours() -> Run:
        def run(seed: int) -> Outcome:
            H = curvature.Hessian(model, loss_fn, data)
            pairs = curvature.eigsh(H, k, "LM", tol=tol, seed=seed)
            return Outcome(pairs.eigenvalues, H.num_matvecs)

        return run

    def curvlinops() -> Run:
        def run(seed: int) -> Outcome:
            operator, count = peers.curvlinops_operator("Hessian", model, loss_fn, data).to_scipy(), 0

            def product(v: Any) -> Any:
                nonlocal count
                count += 1
                return operator @ v

            counted = LinearOperator(operator.shape, matvec=product, dtype=operator.dtype)
            start = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(seed)).numpy()
            values = arpack(counted, k, which="LM", tol=tol, v0=start)[0]
            return Outcome(torch.from_numpy(values), count)

        return run

    def eigenthings() -> Run:
        operator = peers.eigenthings_operator("Hessian", model, loss_fn, data)
        lanczos = peers.load("hessian_eigenthings.algorithms").lanczos
        # it has no stop rule: it is given the least number of 10, 20, 30, ... steps that satisfies its own test
        for steps in range(10, 310, 10):
            if bool(lanczos(operator, k=k, max_iter=steps, tol=tol, reorthogonalize=True, seed=0).converged.all()):
                break

        def run(seed: int) -> Outcome:
            found = lanczos(operator, k=k, max_iter=steps, tol=tol, reorthogonalize=True, seed=seed)
            return Outcome(found.eigenvalues, found.iterations)

        return run

    def pyhessian() -> Run:
        module = peers.load("pyhessian.hessian")
        product = peers.load("pyhessian.utils").hessian_vector_product

        def run(seed: int) -> Outcome:
            count = 0

            def counted(*args: Any) -> Any:
                nonlocal count
                count += 1
                return product(*args)

            for p in model.parameters():
                p.grad = None
            torch.manual_seed(seed)
            module.hessian_vector_product = counted
            found = peers.pyhessian_hessian(model, loss_fn, data).eigenvalues(maxIter=300, tol=tol, top_n=k)
            return Outcome(torch.tensor(found[0]), count)

        return run

    theirs = {"curvlinops": curvlinops, "hessian-eigenthings": eigenthings, "PyHessian": pyhessian}
    return {OURS: ours, **{peer: theirs[peer] for peer in found if peer in theirs}}


def densities(A: Tensor, found: list[str], *, steps: int = 80, probes: int = 5) -> Entries:
    """Nodes and weights, and the curve, of the spectral density of a matrix."""

    def ours() -> Run:
        def run(seed: int) -> Outcome:
            M = Matrix(A)
            density = curvature.spectral_density(M, steps, probes, seed)
            return Outcome((density.nodes, density.weights, density.grid, density.density), M.count)

        return run

    def eigenthings() -> Run:
        operator = peers.load("hessian_eigenthings.operators.base").LambdaOperator
        density = peers.load("hessian_eigenthings.algorithms").spectral_density

        def run(seed: int) -> Outcome:
            M = Matrix(A)
            wrapped = operator(lambda v: M @ v, len(A), dtype=A.dtype)
            r = density(wrapped, num_runs=probes, lanczos_steps=steps, seed=1000 * seed)
            return Outcome((r.raw_eigenvalues.flatten(), r.raw_weights.flatten(), r.grid, r.density), M.count)

        return run

    def curvlinops() -> Run:
        spectrum = peers.load("curvlinops.papyan2020traces.spectrum")

        def run(seed: int) -> Outcome:
            torch.manual_seed(seed)
            M = Matrix(A)
            cached = spectrum.LanczosApproximateSpectrumCached(M, steps)
            curve = cached.approximate_spectrum(num_repeats=probes)
            values, vectors = zip(*cached._get_lanczos_iters(probes), strict=True)
            weights = torch.cat([v[0] ** 2 for v in vectors])
            return Outcome((torch.cat(values), weights, *curve), M.count)

        return run

    theirs = {"curvlinops": curvlinops, "hessian-eigenthings": eigenthings}
    return {OURS: ours, **{peer: theirs[peer] for peer in found if peer in theirs}}


def traces(model: nn.Module, loss_fn: nn.Module, data: peers.Batches, found: list[str], budget: int) -> Entries:
    """The trace of the Hessian, from at most that many products."""
    entries: dict[str, Callable[[], Run]] = {}
    # every method that the installed version offers
    options = inspect.signature(curvature.trace).parameters
    methods = ("hutchinson", "hutch++", "xtrace") if "method" in options else (None,)
    for method in methods:

        def ours(method: str | None = method) -> Run:
            named: dict[str, Any] = {} if method is None else {"method": method}

            def run(seed: int) -> Outcome:
                H = curvature.Hessian(model, loss_fn, data)
                estimate = curvature.trace(H, budget, seed, **named).estimate
                return Outcome(float(estimate), H.num_matvecs)

            return run

        entries[OURS if method in (None, "hutchinson") else f"{OURS} {method}"] = ours

    if "hessian-eigenthings" in found:
        for method in ("hutchinson", "hutch++"):

            def eigenthings(method: str = method) -> Run:
                operator = peers.eigenthings_operator("Hessian", model, loss_fn, data)
                trace = peers.load("hessian_eigenthings.algorithms").trace
                return lambda seed: Outcome(
                    trace(operator, num_matvecs=budget, method=method, seed=seed).estimate, budget
                )

            entries[f"hessian-eigenthings {method}"] = eigenthings
    if "curvlinops" in found:
        for method in ("hutchinson_trace", "hutchpp_trace", "xtrace"):

            def curvlinops(method: str = method) -> Run:
                operator = peers.curvlinops_operator("Hessian", model, loss_fn, data)
                trace = getattr(peers.load("curvlinops"), method)

                def run(seed: int) -> Outcome:
                    torch.manual_seed(seed)
                    return Outcome(float(trace(operator, budget)), budget)

                return run

            entries[f"curvlinops {method}"] = curvlinops
    if "PyHessian" in found:

        def pyhessian() -> Run:
            def run(seed: int) -> Outcome:
                for p in model.parameters():
                    p.grad = None
                torch.manual_seed(seed)
                samples = peers.pyhessian_hessian(model, loss_fn, data).trace(maxIter=budget)
                return Outcome(sum(samples) / len(samples), len(samples))

            return run

        entries["PyHessian"] = pyhessian
    return entries


def quietly(run: Run) -> Run:
    """The same run; what it warns of is left to its error to tell."""

    def quiet(seed: int) -> Outcome:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(seed)

    return quiet
