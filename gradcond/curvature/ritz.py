"""What Ritz values and their residuals say about the smallest nonzero |eigenvalue|."""

from __future__ import annotations

import math

import numpy as np


def smallest_converged(
    values: np.ndarray, residuals: np.ndarray, floor: float, tol: float
) -> tuple[int | None, float, bool]:
    """Of the smallest converged |value| above the floor: index, error of kappa, and whether none is smaller."""
    gaps = np.concatenate([[np.inf], np.diff(values), [np.inf]])
    gaps = np.minimum(np.minimum(gaps[1:], gaps[:-1]), np.abs(values)) + np.finfo(float).tiny
    errors = residuals**2 / np.maximum(residuals, gaps)  # the smaller one of residual and residual^2 / gap
    above = np.flatnonzero(np.abs(values) > floor)
    converged = above[errors[above] <= tol * np.abs(values[above])]
    if len(converged) == 0:
        return None, math.inf, False
    best = converged[np.abs(values[converged]).argmin()]
    top = np.abs(values).argmax()
    error = errors[best] / np.abs(values[best]) + errors[top] / np.abs(values[top])
    return int(best), float(error), bool(np.abs(values[above]).min() >= np.abs(values[best]))


def steps_unchanged(sizes: list[float], tol: float, definite: bool) -> int:
    """For how many steps the smallest has been what it is.

    Ritz values of a definite matrix only fall: a smaller one that has vanished has gone to zero, where rounding
    leads, and there was nothing on its way. Of an indefinite one they jump.
    """
    earlier, last = np.array(sizes), sizes[-1]
    changed = earlier > (1 + tol) * last
    if not definite:
        changed |= earlier < (1 - tol) * last
    return len(sizes) - 1 - int(np.flatnonzero(changed).max(initial=0))


def lower_bounds(values: np.ndarray, residuals: np.ndarray, floor: float, noise: float = 0.0) -> np.ndarray:
    """Lower bounds of kappa from unit vectors v with the Rayleigh quotient theta and the residual r.

    |A v|^2 = theta^2 + r^2 is a sum of lambda^2 over v, at least lambda_min_nonzero times the sum of |lambda|, and
    that is at least |theta|: lambda_min_nonzero is no more than |theta| + r^2 / |theta|. Eigenvalues below the
    floor make the square no smaller, and |theta| larger by no more than the floor times their share in v,
    (r / (|theta| - floor))^2. Rounding, an eighth of the floor, or the noise of the products where that is more, is
    taken off or added wherever it may be.
    """
    sizes, rounding = np.abs(values), max(floor / 8, noise)
    above = sizes > floor
    size, residual = sizes[above], residuals[above]
    least = size - rounding
    share = np.minimum(1.0, residual / (size - floor)) ** 2
    bounds, quotient = np.ones_like(sizes), size + rounding + (residual + rounding) ** 2 / least
    bounds[above] = (sizes.max() - rounding) * (1 - floor / least * share) / quotient
    return np.maximum(bounds, 1.0)
