"""Condition numbers that say what they know."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from gradcond.curvature.basis import reorthogonalize_
from gradcond.curvature.dense import with_zeros
from gradcond.curvature.lanczos import Lanczos
from gradcond.curvature.operators import Products, generator_from
from gradcond.curvature.ritz import lower_bounds, smallest_converged, steps_unchanged
from gradcond.curvature.root import eigenvalues_by_root

FLOOR = 8  # x eps x max|lambda|: float32 resolves condition numbers up to 1e6
# a smaller eigenvalue may show up late: the smallest must have stood still, to tol, for so many steps (of 502
# answers on random spectra 2 are off by more than tol then; of values that have just converged, 7 of 100); where
# the budget allows, the search goes on until the error is this share of tol
CONFIRM, SHARPER = 10, 0.05


@dataclass(frozen=True)
class ConditionNumber:
    """What is known of max|lambda| / min|lambda|, zero eigenvalues apart; printed, it says so.

    Example:
        >>> print(condition_number(torch.diag(torch.tensor([1e8, 1.0]))))
        kappa = 1 (unresolved below 95)
    """

    kappa: float  # max|lambda| / lambda_min_nonzero; nan when not resolved
    lambda_max: float  # algebraically largest eigenvalue seen
    lambda_min: float  # algebraically smallest eigenvalue seen, zero included
    lambda_min_nonzero: float  # smallest |lambda| above noise_floor that has converged; nan if there is none
    noise_floor: float  # an |lambda| below this cannot be told from zero
    resolved: bool  # whether lambda_min_nonzero has been confirmed, and the bound below does not rule it out
    converged: (
        bool  # whether nothing that has not converged is left above noise_floor and below the smallest that has
    )
    kappa_lower_bound: float  # certified by one explicit product A v with a unit vector v, or by all eigenvalues
    lower_bounds: Tensor  # (steps,) float64, never falling: the bound known after each Lanczos step, or by these
    num_matvecs: int

    def __str__(self) -> str:
        if not self.resolved:
            return f"kappa >= {self.kappa_lower_bound:.4g}, unresolved below {self.noise_floor:.2g}"
        return f"kappa = {self.kappa:.4g} (unresolved below {self.noise_floor:.2g})"


def condition_number(
    A: Any,
    *,
    max_matvecs: int = 200,
    tol: float = 1e-2,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> ConditionNumber:
    """The condition number of A on its range, max|lambda| / min|lambda| over the nonzero eigenvalues.

    Lanczos from A z, z random, stays in the range of A, where its Ritz values close in on the smallest
    nonzero |lambda|; from z itself they would slide into the null space. A Ritz value theta with residual r
    and distance g to the next one (or to zero) has the error min(r, r^2 / g) and has converged when that is below
    tol |theta|. The smallest counts when the space is invariant, or when it has stood still for 10 steps and the
    errors at both ends are below tol / 2 together, tol / 20 where the budget allows. Whatever |theta| is below
    the noise floor, max(8 eps max|lambda|, measured noise), is zero. No unit vector v has |A v|^2 / |v^T A v|
    below lambda_min_nonzero: from a Ritz vector that bounds kappa from below, nearly as sharp as kappa converges.

    GGN and Fisher matrices, their blocks and preconditioned ones, are J^T B J with a row of J for each of r outputs
    (data times classes). Where the budget pays for r / 2 products nothing is estimated: with B = C S C^T, S of
    signs, the eigenvalues that are not zero are those of S (C^T J) (C^T J)^T, an (r, r) matrix.

    Args:
        A: any symmetric (n, n) thing with ``shape`` and ``@``.
        max_matvecs: most products, at least 5; the rank of A is always enough, far fewer often are.
        tol: error of kappa and of lambda_min_nonzero allowed, relative to themselves; what products lack of A, by
            rounding and noise, adds up to noise_floor / lambda_min_nonzero to it.
        seed: of the random start.
        progress: called with the number of products just done.

    Returns:
        A numerical outcome, never an exception: kappa and lambda_min_nonzero are nan and ``resolved`` is
        False when the smallest above the noise floor has not been confirmed. kappa_lower_bound holds in any case.

    Raises:
        ValueError: max_matvecs < 5, tol is negative, A is not square, not symmetric or not repeatable.

    References:
        B. N. Parlett, The Symmetric Eigenvalue Problem, 1980, section 11.7 (the error r^2 / g).

    Example:
        >>> c = condition_number(torch.diag(torch.tensor([8.0, -4.0, 2.0, 0.0])))
        >>> print(f"{c.kappa:.3f}", c.resolved, c.converged)
        4.000 True True
    """
    if max_matvecs < 5:
        raise ValueError(f"max_matvecs must be at least 5, got {max_matvecs}")
    if not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol}")
    products, generator = Products(A, progress), generator_from(seed)
    z = products.gaussian(generator)
    start = products(z)
    size = float(start.abs().max())
    products.check_symmetry(0.0, size)
    if size == 0:
        return _zero_matrix(products)
    known = eigenvalues_by_root(products, min(2 * (max_matvecs - products.count), products.n), (z, start))
    if known is not None:
        # to tol beside what products lack of A, as below: all that is above the floor counts
        return condition_of(with_zeros(known[0], products.n, 1), known[1], max(tol, 1 / FLOOR), products.count)
    lanczos = Lanczos(products, start, generator=generator, breakdown=FLOOR)
    bounds, history, confirmed = [1.0], [], False
    # one product is kept for the certificate, one for the null space
    while lanczos.size < products.n and products.count < max_matvecs - 2:
        lanczos.step()
        values, vectors, residuals = lanczos.eigh()
        floor = noise_floor(lanczos)
        bounds.append(max(bounds[-1], float(lower_bounds(values, residuals, floor, noise_norm(lanczos)).max())))
        smallest, error, done = smallest_converged(values, residuals, floor, tol)
        value = np.abs(values)[np.abs(values) > floor].min(initial=math.inf)
        history.append(value)
        definite = bool((values > -floor).all() or (values < floor).all())
        still = steps_unchanged(history, tol, definite) >= CONFIRM
        confirmed = done and (lanczos.invariant or (error <= tol / 2 and still))
        if lanczos.invariant or (confirmed and error <= SHARPER * tol):
            break
    best = vectors[:, [lower_bounds(values, residuals, floor, noise_norm(lanczos)).argmax()]]
    certified = _certify(lanczos, best, floor)
    lambda_min, lambda_max, image = _extremes(lanczos, z)
    # a start in the range has as little of an eigenvalue as A: its space may seem invariant without it
    hidden = lanczos.invariant and image > floor
    # a certificate of something smaller overrules the smallest that has converged
    if hidden or not confirmed or certified * value > (1 + 2 * tol) * lanczos.top:
        smallest = None
    nonzero = math.nan if smallest is None else float(abs(values[smallest]))
    return ConditionNumber(
        kappa=float(np.abs(values).max()) / nonzero,
        lambda_max=lambda_max,
        lambda_min=lambda_min,
        lambda_min_nonzero=nonzero,
        noise_floor=floor,
        resolved=smallest is not None,
        converged=done and not hidden,
        kappa_lower_bound=certified,
        lower_bounds=torch.tensor(bounds[1:], dtype=torch.float64, device="cpu"),
        num_matvecs=products.count,
    )


def condition_of(values: Tensor, error: float, tol: float, count: int) -> ConditionNumber:
    """That of all eigenvalues, ascending, each known up to an error; of zeros one is enough."""
    sizes = values.abs()
    top, floor = float(sizes.max()), FLOOR * error
    above = sizes[sizes > floor]
    settled = above[error <= tol * above]
    smallest = float(settled.min()) if len(settled) else math.nan
    bound = max(1.0, (top - error) / (float(above.min()) + error)) if len(above) else 1.0
    if bound * smallest > (1 + 2 * tol) * top:  # something smaller is there, not known to tol
        smallest = math.nan
    return ConditionNumber(
        kappa=top / smallest,
        lambda_max=float(values[-1]),
        lambda_min=float(values[0]),
        lambda_min_nonzero=smallest,
        noise_floor=floor,
        resolved=not math.isnan(smallest),
        converged=len(settled) == len(above),
        kappa_lower_bound=bound,
        lower_bounds=torch.tensor([bound], dtype=torch.float64, device="cpu"),
        num_matvecs=count,
    )


def noise_floor(lanczos: Lanczos) -> float:
    """What an |eigenvalue| must exceed to differ from zero: rounding, or the measured noise of products."""
    return max(FLOOR * lanczos.products.eps * lanczos.top, noise_norm(lanczos))


def noise_norm(lanczos: Lanczos) -> float:
    """The norm of what products add to T that is not in A, from the entries that should be zero."""
    # a random symmetric (m, m) matrix with entries of size s has the norm 2 s sqrt(m)
    return 2 * lanczos.noise * lanczos.size**0.5


def _certify(lanczos: Lanczos, vector: np.ndarray, floor: float) -> float:
    """A lower bound of kappa from one Ritz vector, by an explicit product."""
    v = lanczos.combine(vector)[:, 0]
    image, v = lanczos.products(v).double(), v.double()
    value = v @ image
    residual, noise = (image - value * v).norm(), noise_norm(lanczos)
    bounds = lower_bounds(np.array([float(value), lanczos.top]), np.array([float(residual), 0.0]), floor, noise)
    return float(bounds.max())


def _extremes(lanczos: Lanczos, z: Tensor) -> tuple[float, float, float]:
    """Smallest and largest eigenvalue seen, by one product with what z has outside the range, and its norm."""
    alphas, betas, z = lanczos.alphas, lanczos.betas, z.double()
    norm, size = z.norm(), 0.0
    for _ in range(2):
        reorthogonalize_(lanczos.parts, z[None])
    # the range start leaves out one direction of the Krylov space of z: the end of a longer T
    if float(z.norm()) > 1e-4 * float(norm):
        z /= z.norm()
        image = lanczos.products(z.to(lanczos.products.work_dtype)).double()
        size = float(image.norm())
        alphas, betas = [*alphas, float(z @ image)], [*betas, float(z @ lanczos.residual)]
    values = eigvalsh_tridiagonal(np.array(alphas), np.array(betas))
    return float(values[0]), float(values[-1]), size


def _zero_matrix(products: Products) -> ConditionNumber:
    nan, none = math.nan, torch.ones(0, dtype=torch.float64, device="cpu")
    return ConditionNumber(nan, 0.0, 0.0, nan, 0.0, False, True, 1.0, none, products.count)
