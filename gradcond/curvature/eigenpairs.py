"""Extreme eigenpairs, each certified by a product of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradcond.curvature.basis import Basis
from gradcond.curvature.krylov import Krylov
from gradcond.curvature.lanczos import BREAKDOWN
from gradcond.curvature.memory import placement
from gradcond.curvature.operators import Products, generator_from
from gradcond.curvature.search import Search
from gradcond.curvature.wanted import WHICH, wanted

FRESH = 0.1  # share of randomness in a warm start: what the earlier vectors lack starts from there


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
    max_vectors: int | None = None,
    block: int = 1,
    start: Tensor | Eigenpairs | None = None,
    basis_device: torch.device | str | None = None,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> Eigenpairs:
    """The k largest (LA), smallest (SA), largest in magnitude (LM) or outermost (BE) eigenpairs, certified.

    Lanczos with full reorthogonalization until the residual of each wanted Ritz pair is below
    tol max|lambda|, with thick restarts where the basis is bounded. One start vector cannot see multiple
    eigenvalues, so a Krylov space from a second one, orthogonal to the first, then looks for copies until it
    would have found one with 99 %: up to n = 4096, and beyond where a breakdown or a double eigenvalue has
    shown that copies occur. ``block=b`` sees multiplicities up to b whatever n is. At last one explicit
    product per pair gives its eigenvalue (Rayleigh quotient) and its residual |A v - lambda v|.

    Args:
        A: any symmetric (n, n) thing with ``shape`` and ``@``.
        k: number of pairs, 1 to n.
        which: "LA", "SA", "LM" or "BE"; the pairs come in this order, the most extreme first, signs kept. BE is
            the k - k // 2 largest, the largest first, then the k // 2 smallest, the smallest first.
        tol: residual allowed, relative to the largest |lambda| found.
        max_matvecs: most products, the k certifying ones included; max(20 k, 300) + k when None.
        max_vectors: most vectors of n numbers in the basis, at least k + 2 block; fewer need more products.
            When None, one for each product, or as many as there is memory for.
        block: vectors multiplied at a time, by one pass over the data: for clusters.
        start: earlier eigenvectors, (n, j) or an Eigenpairs, of an operator that has changed a little since.
            What they lack is found from a tenth of randomness, so an eigenvalue that comes out of nowhere takes
            a tolerance of about 1e-6 to be seen.
        basis_device: where the basis is kept; when None with A, or on the CPU if it does not fit there.
        seed: of the random start.
        progress: called with the number of products just done, such as ``tqdm.update``.

    Returns:
        The pairs in A's working dtype, on its device. Where ``converged`` is False the residual still holds; a
        warning says so, and where the bounds were too small to rule out copies of those that have converged.

    Raises:
        ValueError: k is not in 1..n, which is unknown, tol is negative, A is not square, not symmetric or not
            repeatable, start is not (n, j) or not finite, a bound is too small.
        MemoryError: not even k + 2 block vectors fit; with the size.

    References:
        B. N. Parlett, The Symmetric Eigenvalue Problem, 1980, chapter 13.
        K. Wu, H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, 2000.

    Example:
        >>> pairs = eigsh(torch.diag(torch.tensor([3.0, -5.0, 1.0, 0.0])), k=2, which="LM")
        >>> pairs.eigenvalues, pairs.converged
        (tensor([-5.,  3.]), tensor([True, True]))
    """
    products = Products(A, progress)
    n = products.n
    if which not in WHICH:
        raise ValueError(f"which must be one of {', '.join(WHICH)}, got {which!r}")
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n}, got {k}; the matrix has {n} eigenvalues")
    if not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    budget = max(20 * k, 300) if max_matvecs is None else max_matvecs - k
    if budget < k:
        raise ValueError(f"max_matvecs must be at least {2 * k}, got {max_matvecs}; each pair costs two")
    least = min(n, k + 2 * block)
    if max_vectors is not None and max_vectors < least:
        raise ValueError(f"max_vectors must be at least {least}, k + 2 block, got {max_vectors}")
    rows = None if start is None else _start_rows(start, n, block)
    device, max_vectors = _placement(products, k, block, max_vectors, basis_device, least, min(n, budget))
    generator = generator_from(seed)
    # what a breakdown drops must stay below the tolerance
    eps = torch.finfo(products.work_dtype).eps
    breakdown = min(BREAKDOWN * eps, max(0.25 * tol, eps))
    basis = Basis(n, products.work_dtype, device, max_vectors)
    space = Krylov(products, basis, generator, breakdown=breakdown)
    if rows is None:
        space.add_random(block)
    else:
        fresh = torch.stack([products.gaussian(generator).double() for _ in rows])
        space.add(rows.to(fresh.device) + FRESH * fresh / fresh.norm(dim=1, keepdim=True))
    search = Search(space, k, which, tol=tol, block=block, max_vectors=max_vectors, budget=budget)
    coefficients, allowed, settled = search.run(), tol * space.top, search.settled
    del search, space  # and the memory of what is pending
    vectors = basis.take(coefficients)
    pairs = _certified(products, vectors.to(products.device), which, allowed)
    _warn(pairs, settled)
    return pairs


def _start_rows(start: Tensor | Eigenpairs, n: int, block: int) -> Tensor:
    """One unit vector per column of a block, float64: sums of the given ones, so that each is in the space."""
    vectors = start.eigenvectors if isinstance(start, Eigenpairs) else start
    if not isinstance(vectors, Tensor):
        raise TypeError(f"expected start as a tensor or Eigenpairs, got {type(start).__name__}")
    if vectors.ndim != 2 or len(vectors) != n or vectors.shape[1] == 0:
        raise ValueError(f"expected start of shape ({n}, j), got {tuple(vectors.shape)}; vectors are columns")
    vectors = vectors.detach().double()
    norms = vectors.norm(dim=0)
    if not bool((norms.isfinite() & (norms > 0)).all()):
        raise ValueError("expected start vectors that are finite and not zero")
    columns = (vectors / norms).mT
    rows = torch.stack([columns[i::block].sum(0) for i in range(min(block, len(columns)))])
    return rows / rows.norm(dim=1, keepdim=True)


def _placement(
    products: Products,
    k: int,
    block: int,
    max_vectors: int | None,
    basis_device: torch.device | str | None,
    least: int,
    most: int,
) -> tuple[torch.device, int]:
    """Where the basis is kept, and how many vectors it may have."""
    devices = [products.device, torch.device("cpu")] if basis_device is None else [torch.device(basis_device)]
    if max_vectors is not None:
        least = most = min(max_vectors, products.n)
    vector = products.n * (torch.finfo(products.work_dtype).bits // 8)
    # beside the basis: the pairs and their products, and in float64 a block, its product and what is pending
    extra = 2 * k * vector + 4 * block * 8 * products.n
    return placement(list(dict.fromkeys(devices)), vector, extra, least, max(most, least))


def _certified(products: Products, vectors: Tensor, which: str, allowed: float) -> Eigenpairs:
    image = products(vectors)
    k = vectors.shape[1]
    eigenvalues = torch.stack([vectors[:, i].double() @ image[:, i].double() for i in range(k)])
    residuals = torch.stack(
        [(image[:, i].double() - eigenvalues[i] * vectors[:, i].double()).norm() for i in range(k)]
    )
    index = torch.as_tensor(wanted(eigenvalues.cpu().numpy(), k, which).copy(), device=vectors.device)
    converged = residuals <= allowed
    return Eigenpairs(
        eigenvalues=eigenvalues[index].to(vectors.dtype),
        eigenvectors=vectors[:, index],
        residuals=residuals[index].to(vectors.dtype),
        converged=converged[index],
        num_matvecs=products.count,
    )


def _warn(pairs: Eigenpairs, settled: bool) -> None:
    """Say so where something has not converged, or may hide behind what has."""
    failed, count = int((~pairs.converged).sum()), pairs.num_matvecs
    if failed:
        largest = float(pairs.residuals.max())
        warnings.warn(
            f"{failed} of {len(pairs.residuals)} eigenpairs not converged in {count} products "
            f"(largest residual {largest:.1e}); raise max_matvecs, max_vectors or tol",
            stacklevel=3,
        )
    elif not settled:
        warnings.warn(
            f"copies of the {len(pairs.residuals)} eigenvalues found are not ruled out in {count} products; raise "
            "max_matvecs or max_vectors, or use block",
            stacklevel=3,
        )
