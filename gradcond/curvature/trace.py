"""Trace and diagonal from random probes, with their standard errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradcond.curvature.operators import Products, generator_from

BLOCK = 8  # probes multiplied together: they share the forward passes


@dataclass(frozen=True)
class Estimate:
    """An unbiased estimate; exact, with standard error zero, when num_matvecs >= n.

    Example:
        >>> trace(torch.eye(9), num_matvecs=3)  # every probe gives 9
        Estimate(estimate=tensor(9., dtype=torch.float64), std_error=tensor(0., ...), num_matvecs=3)
    """

    estimate: Tensor  # () for a trace, (n,) for a diagonal
    std_error: Tensor  # of the same shape; nan after a single probe
    num_matvecs: int


def trace(
    A: Any, num_matvecs: int = 100, seed: int = 0, *, progress: Callable[[int], Any] | None = None
) -> Estimate:
    """The sum of the eigenvalues, the mean of z^T A z over random signs z.

    Exact from the n unit vectors when num_matvecs >= n. The variance of one probe is twice the squared norm
    of the off-diagonal part.

    Args:
        A: any symmetric (n, n) thing with ``shape`` and ``@``.
        num_matvecs: products to spend.
        seed: of the random signs.
        progress: called with the number of products just done.

    Returns:
        Estimate and standard error, float64 scalars.

    Raises:
        ValueError: num_matvecs < 1, A is not square, not symmetric or not repeatable.

    References:
        M. F. Hutchinson, A stochastic estimator of the trace of the influence matrix, 1990.

    Example:
        >>> trace(torch.diag(torch.tensor([3.0, 2.0, 1.0]))).estimate
        tensor(6., dtype=torch.float64)
    """
    return _estimate(Products(A, progress), num_matvecs, seed, lambda z, image: (z * image).sum(0))


def diagonal(
    A: Any, num_matvecs: int = 100, seed: int = 0, *, progress: Callable[[int], Any] | None = None
) -> Estimate:
    """The diagonal (n,), the mean of z * (A z) over random signs z; arguments as in :func:`trace`.

    Exact from the n unit vectors when num_matvecs >= n.

    References:
        C. Bekas, E. Kokiopoulou, Y. Saad, An estimator for the diagonal of a matrix, 2007.

    Example:
        >>> diagonal(torch.tensor([[3.0, 1.0], [1.0, 2.0]])).estimate
        tensor([3., 2.], dtype=torch.float64)
    """
    return _estimate(Products(A, progress), num_matvecs, seed, lambda z, image: (z * image).mT)


def _estimate(
    products: Products, num_matvecs: int, seed: int, sample: Callable[[Tensor, Tensor], Tensor]
) -> Estimate:
    if num_matvecs < 1:
        raise ValueError(f"num_matvecs must be at least 1, got {num_matvecs}")
    exact = num_matvecs >= products.n
    probes = _units(products) if exact else _signs(products, num_matvecs, seed)
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    first: tuple[Tensor, Tensor] | None = None
    for z in probes:
        image = products(z).double()
        z = z.double()
        if first is None:
            first = z[:, :2], image[:, :2]
            _check_symmetry(products, *first)
        # running mean and sum of squared deviations, block by block (Chan, Golub, LeVeque)
        samples = sample(z, image)
        size, center = len(samples), samples.mean(0)
        shift = center - mean
        squares = squares + ((samples - center) ** 2).sum(0) + shift**2 * count * size / (count + size)
        mean = mean + shift * size / (count + size)
        count += size
    if exact:
        return Estimate(mean * count, torch.zeros_like(mean), products.count)
    variance = squares / (count - 1) if count > 1 else torch.full_like(mean, torch.nan)
    return Estimate(mean, (variance / count).sqrt(), products.count)


def _check_symmetry(products: Products, z: Tensor, image: Tensor) -> None:
    if z.shape[1] > 1:
        asymmetry = (z[:, 0] @ image[:, 1] - z[:, 1] @ image[:, 0]).abs() / (z[:, 0].norm() * z[:, 1].norm())
        scale = (image.norm(dim=0) / z.norm(dim=0)).max()
        products.check_symmetry(float(asymmetry), float(scale))


def _signs(products: Products, count: int, seed: int) -> Iterator[Tensor]:
    generator = generator_from(seed)
    for start in range(0, count, BLOCK):
        shape = (products.n, min(BLOCK, count - start))
        signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1
        yield signs.to(products.device, products.work_dtype)


def _units(products: Products) -> Iterator[Tensor]:
    for start in range(0, products.n, BLOCK):
        units = torch.zeros(products.n, min(BLOCK, products.n - start), dtype=products.work_dtype)
        units[start : start + BLOCK].fill_diagonal_(1)
        yield units.to(products.device)
