"""Extreme eigenpairs, each certified by a product of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradcond.curvature.lanczos import BREAKDOWN, Lanczos
from gradcond.curvature.operators import Products, generator_from

LOOK = 6  # steps that show a copy of an outlier: each multiplies its part of a random vector by 3 or so
# the sort key of each choice: the wanted eigenvalues have the largest keys
KEYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"LA": lambda x: x, "SA": lambda x: -x, "LM": np.abs}


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs in the order asked for, with their certificates.

    Example:
        >>> pairs = eigsh(torch.diag(torch.tensor([3.0, -5.0, 1.0])), k=1, which="SA")
        >>> pairs.eigenvectors.abs().round(decimals=4).T
        tensor([[0., 1., 0.]])
    """

    eigenvalues: Tensor  # (k,) signed
    eigenvectors: Tensor  # (n, k) orthonormal columns
    residuals: Tensor  # (k,) |A v - lambda v|: some eigenvalue lies within it
    converged: Tensor  # (k,) bool, residual <= tol max|lambda|
    num_matvecs: int  # the k certifying products included


def eigsh(
    A: Any,
    k: int = 5,
    which: str = "LA",
    *,
    tol: float = 1e-6,
    max_matvecs: int | None = None,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> Eigenpairs:
    """The k largest (LA), smallest (SA) or largest in magnitude (LM) eigenpairs, certified.

    Lanczos with full reorthogonalization until the residual of each wanted Ritz pair, |r| |last component|,
    is below tol max|lambda|; a few steps from a second start vector, orthogonal to the pairs, then look for
    the multiple eigenvalues that the first cannot see, and whatever they find is pursued in the same way.
    At last one explicit product per pair gives its eigenvalue (Rayleigh quotient) and its residual
    |A v - lambda v|. The basis takes n numbers per product.

    Args:
        A: any symmetric (n, n) thing with ``shape`` and ``@``.
        k: number of pairs, 1 to n.
        which: "LA", "SA" or "LM"; the pairs come in this order, the most extreme first, signs kept.
        tol: residual allowed, relative to the largest |lambda| found.
        max_matvecs: most products, the k certifying ones included; max(20 k, 300) + k when None.
        seed: of the random start.
        progress: called with the number of products just done, such as ``tqdm.update``.

    Returns:
        The pairs in A's working dtype. Where ``converged`` is False the residual still holds; a warning
        says so.

    Raises:
        ValueError: k is not in 1..n, which is unknown, A is not square, not symmetric or not repeatable.

    References:
        B. N. Parlett, The Symmetric Eigenvalue Problem, 1980, chapter 13.

    Example:
        >>> pairs = eigsh(torch.diag(torch.tensor([3.0, -5.0, 1.0, 0.0])), k=2, which="LM")
        >>> pairs.eigenvalues, pairs.converged
        (tensor([-5.,  3.]), tensor([True, True]))
    """
    products = Products(A, progress)
    n = products.n
    if which not in KEYS:
        raise ValueError(f"which must be one of {', '.join(KEYS)}, got {which!r}")
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n}, got {k}; the matrix has {n} eigenvalues")
    budget = max(20 * k, 300) if max_matvecs is None else max_matvecs - k
    if budget < k:
        raise ValueError(f"max_matvecs must be at least {2 * k}, got {max_matvecs}; each pair costs two")
    generator = generator_from(seed)
    # what a breakdown drops must stay below the tolerance
    breakdown = min(BREAKDOWN, 0.25 * tol / torch.finfo(products.work_dtype).eps)
    start = products.gaussian(generator)
    lanczos = Lanczos(products, start, generator=generator, breakdown=breakdown)
    while lanczos.size < n and products.count < budget:
        lanczos.step()
        if lanczos.size >= k and _finished(lanczos, k, KEYS[which], tol):
            break
    return _certified(lanczos, k, KEYS[which], tol)


def _finished(lanczos: Lanczos, k: int, key: Callable[[np.ndarray], np.ndarray], tol: float) -> bool:
    """Whether the wanted pairs have converged, and a second start vector finds no more of them."""
    values, coefficients, residuals = lanczos.eigh()
    order = np.argsort(-key(values), kind="stable")[:k]
    allowed = tol * lanczos.top
    if (residuals[order] > 0.5 * allowed).any():
        return False
    # one start vector sees one eigenvector of each eigenvalue: look again, orthogonal to what it found
    if lanczos.block > 0:
        found, fresh = lanczos.eigh(0, lanczos.block)[0], lanczos.eigh(lanczos.block)[0]
        bar = np.sort(key(found))[-k] + allowed if len(found) >= k else -np.inf
        if key(fresh).max() <= bar:
            return lanczos.invariant or len(fresh) >= LOOK + k // 3
    if not lanczos.invariant:
        lanczos.lock(values[order], coefficients[:, order])
    return False


def _certified(lanczos: Lanczos, k: int, key: Callable[[np.ndarray], np.ndarray], tol: float) -> Eigenpairs:
    values, coefficients, _ = lanczos.eigh()
    order = np.argsort(-key(values), kind="stable")[:k]
    vectors = lanczos.combine(coefficients[:, order])
    image = lanczos.products(vectors).double()
    exact = vectors.double()
    eigenvalues = (exact * image).sum(0)
    residuals = (image - exact * eigenvalues).norm(dim=0)
    order = np.argsort(-key(eigenvalues.cpu().numpy()), kind="stable")
    index = torch.as_tensor(order, device=vectors.device)
    converged = residuals <= tol * lanczos.top
    if not bool(converged.all()):
        warnings.warn(
            f"{int((~converged).sum())} of {k} eigenpairs not converged in {lanczos.products.count} products "
            f"(largest residual {float(residuals.max()):.1e}); raise max_matvecs or tol",
            stacklevel=3,
        )
    dtype = lanczos.products.work_dtype
    return Eigenpairs(
        eigenvalues=eigenvalues[index].to(dtype),
        eigenvectors=vectors[:, index],
        residuals=residuals[index].to(dtype),
        converged=converged[index],
        num_matvecs=lanczos.products.count,
    )
