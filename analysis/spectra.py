"""Measure a spectrum: its certified ends, trace, density and condition number, as numbers and arrays."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradcond import curvature

# what spectrum.npz holds for each checkpoint and variant, under "INDEX/VARIANT/NAME"
ARRAYS = ("eigenvalues", "residuals", "nodes", "weights", "grid", "density", "cdf", "std_error")

Numbers = dict[str, Any]
Arrays = dict[str, np.ndarray]
Keep = Callable[[str, Callable[[], Any]], Any]


def measure(
    operator: Any,
    keep: Keep,
    starts: dict[str, curvature.Eigenpairs],
    *,
    num_matvecs: int,
    num_probes: int,
    top: int,
    kappa_matvecs: int,
    seed: int,
    report: Callable[[int], Any],
) -> tuple[Numbers, Arrays]:
    """Return the numbers and the arrays of one spectrum.

    What did not converge is told by `converged` and `residuals`, not by a warning.

    Args:
        operator: any symmetric (n, n) thing with `shape` and `@`.
        keep: `keep(name, measure)` returns what `measure()` does, or what an earlier run has kept of it.
        starts: the eigenpairs of the checkpoint before, which both searches start from; gets these.
        num_matvecs: products per probe of the density; more than n are not spent.
        num_probes: random probes of the density.
        top: eigenvalues at each end; more than n are not sought.
        kappa_matvecs: most products for the condition number.
        seed: of the probes and start vectors.
        report: called with the number of products as they happen.

    Returns:
        Numbers for the report, and the arrays named in ARRAYS.
    """
    n = operator.shape[0]
    common: Any = {"seed": seed, "progress": report}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for end, which in (("largest", "LA"), ("smallest", "SA")):
            search = partial(curvature.eigsh, operator, min(top, n), which, start=starts.get(end), **common)
            starts[end] = keep(end, search)
    largest, smallest = starts["largest"], starts["smallest"]
    condition = keep("condition", lambda: curvature.condition_number(operator, max_matvecs=kappa_matvecs, **common))
    shape: Any = {"num_matvecs": min(num_matvecs, n), "num_probes": num_probes, "grid": "symlog"}
    density = keep("density", lambda: curvature.spectral_density(operator, **shape, **common))
    trace = keep("trace", lambda: curvature.trace(operator, **common))
    numbers = {
        "exact": False,
        "largest": _pairs(largest),
        "smallest": _pairs(smallest),
        "trace": scalars(trace),
        "condition": scalars(condition),
        "density": scalars(density),
        "bulk": bulk(density, float(condition.noise_floor), float(condition.lambda_max)),
        "num_matvecs": sum(r.num_matvecs for r in (largest, smallest, condition, density, trace)),
    }
    ends = {
        name: np.concatenate([_array(getattr(smallest, name)), _array(getattr(largest, name))[::-1]])
        for name in ("eigenvalues", "residuals")
    }
    return numbers, {name: ends[name] if name in ends else _array(getattr(density, name)) for name in ARRAYS}


def measure_exact(matrix: Callable[[], Any], keep: Keep, *, top: int) -> tuple[Numbers, Arrays]:
    """Return what `measure` does, from all eigenvalues of a matrix that has been written out.

    Args:
        matrix: gives any symmetric (n, n) thing with `shape` and `@` whose products are cheap.
        keep: as in `measure`.
        top: eigenvalues told of at each end.
    """
    spectrum = keep("exact", lambda: curvature.exact_spectrum(matrix(), grid="symlog"))
    condition, values = spectrum.condition, spectrum.eigenvalues
    low, high = values[:top], values[-top:]
    ends = {"smallest": low, "largest": high.flip(0)}
    numbers = {
        "exact": True,
        **{end: _known(own, spectrum.error) for end, own in ends.items()},
        "trace": {"estimate": spectrum.trace, "std_error": 0.0, "num_matvecs": len(values)},
        "condition": scalars(condition),
        "density": scalars(spectrum.density),
        "bulk": bulk(spectrum.density, float(condition.noise_floor), float(condition.lambda_max)),
        "num_matvecs": len(values),
    }
    arrays = {name: _array(getattr(spectrum.density, name)) for name in ARRAYS[2:]}
    eigenvalues = torch.cat([low, high])
    return numbers, {
        "eigenvalues": _array(eigenvalues),
        "residuals": _array(torch.full_like(eigenvalues, spectrum.error)),
        **arrays,
    }


def _known(values: Tensor, error: float) -> Numbers:
    return {
        "eigenvalues": values.tolist(),
        "residuals": [error] * len(values),
        "converged": [True] * len(values),
        "num_matvecs": 0,
    }


def bulk(density: Any, floor: float, largest: float) -> Numbers:
    """How far the largest eigenvalue stands out of the middle of those that can be told from zero.

    Where few Lanczos steps leave the bulk unresolved, the median moves by orders of magnitude from probe to
    probe; so the smallest and the largest ratio of single probes are told too.
    """

    def ratio(own: Tensor) -> float:
        part = dataclasses.replace(density, nodes=density.nodes[own], weights=density.weights[own])
        return largest / part.quantile(0.5, absolute=True, above=floor)

    ratios = [ratio(density.probes == probe) for probe in density.probes.unique()]
    return {
        "median_magnitude": float(density.quantile(0.5, absolute=True, above=floor)),
        "ratio": ratio(density.probes >= 0),
        "ratio_of_probes": [min(ratios), max(ratios)],
    }


def _pairs(pairs: Any) -> Numbers:
    names = ("eigenvalues", "residuals", "converged")
    return {**{name: getattr(pairs, name).tolist() for name in names}, "num_matvecs": pairs.num_matvecs}


def scalars(result: Any) -> Numbers:
    """The fields of a result that are single numbers."""
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    fields = {
        name: value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
        for name, value in fields.items()
    }
    return {name: value for name, value in fields.items() if isinstance(value, bool | int | float)}


def _array(values: Any) -> np.ndarray:
    return torch.as_tensor(values).detach().cpu().double().numpy()
