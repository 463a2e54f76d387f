"""Linear and quadratic quantities of a matrix from random probes: deflation and samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcond.curvature.estimates import Estimate, Moments
from gradcond.curvature.exchange import Exchange, Turns, exchange, in_blocks
from gradcond.curvature.operators import Products, generator_from, signs
from gradcond.curvature.root import checked_root

LEAST_BLOCK, MOST_BLOCK, BLOCK_NUMBERS = 8, 64, 1 << 20  # probes multiplied together share the passes
STORE = 1 << 25  # numbers: vectors that fit in here may be kept
LEAST = {"hutchinson": 1, "hutch++": 6, "xtrace": 4}  # products a method needs for a standard error
# least covariance of the samples of xtrace, x what their mean would vary if they were independent: of few, the
# estimate may be below zero, and without this least 1000 intervals cover down to 0.89
COMMON = 0.5
ENOUGH = 20  # products of hutch++ for the eight samples that an interval wants


@dataclass(frozen=True)
class Deflation:
    """An orthonormal Q (n, c) and Z = A Q: what is known of A; Q is empty for plain probes."""

    Q: Tensor
    Z: Tensor

    def outside(self, z: Tensor) -> Tensor:
        """The parts of the columns of z outside the span of Q."""
        return z - self.Q @ (self.Q.mT @ z)


@dataclass(frozen=True)
class Quantity:
    """A sum over the spectrum: the part that a deflation knows, and random samples of the rest."""

    known: Callable[[Deflation], Tensor]
    sample: Callable[[Tensor, Tensor, Deflation], Tensor]  # of probes (n, b) and their images: (b, ...)
    exchanged: Callable[[Exchange], Turns]
    projected: bool = True  # whether the probes are taken outside the span of Q


def estimate(quantity: Quantity, products: Products, num_matvecs: int, seed: int, method: str | None) -> Estimate:
    """The quantity and its standard error by a method of LEAST, or the best that fits when None."""
    chosen, method = method, _method(products, num_matvecs, method)
    if chosen is None and (few := _by_root(quantity, products, num_matvecs)) is not None:
        return few
    if num_matvecs >= products.n:
        return _exact(quantity, products)
    generator, block = generator_from(seed), _block(products.n)
    if method == "xtrace":
        omega = _signs(products, num_matvecs // 2, generator)
        x = exchange(products, omega, block)
        _check_symmetry(products, omega, x.Y)
        return _in_turn(quantity.exchanged(x), products.count)
    count = num_matvecs // 3 if method == "hutch++" else 0
    known = _deflated(products, _signs(products, count, generator))
    moments = Moments()
    for start in range(0, num_matvecs - 2 * count, block):
        z = _signs(products, min(block, num_matvecs - 2 * count - start), generator)
        mass = torch.ones((), device="cpu")
        if quantity.projected and count:
            z = known.outside(z.double())
            # as long as the rest of the space is wide
            mass = (products.n - count) / z.square().sum(0)
            z = z.to(products.work_dtype)
        image = products(z).double()
        if start == 0 and not count:
            _check_symmetry(products, z, image)
        samples = quantity.sample(z.double(), image, known)
        moments.add(samples * mass.to(samples).reshape(-1, *[1] * (samples.ndim - 1)))
    total = quantity.known(known) + moments.mean
    return Estimate(total, moments.std_error, products.count, moments.count, moments.skewness)


def _block(n: int) -> int:
    """How many probes of n numbers are multiplied together."""
    return min(MOST_BLOCK, max(LEAST_BLOCK, BLOCK_NUMBERS // n))


def _method(products: Products, num_matvecs: int, method: str | None) -> str:
    if num_matvecs < 1:
        raise ValueError(f"num_matvecs must be at least 1, got {num_matvecs}")
    if method is None:
        small = num_matvecs < ENOUGH or products.n * num_matvecs > STORE
        return "hutchinson" if small else "hutch++"
    if method not in LEAST:
        raise ValueError(f"method must be one of {', '.join(LEAST)}, got {method!r}")
    if num_matvecs < LEAST[method]:
        raise ValueError(f"{method} needs at least {LEAST[method]} products, got {num_matvecs}; use hutchinson")
    return method


def _in_turn(turns: Turns, num_matvecs: int) -> Estimate:
    """The mean of correlated samples, whose variance is what independent ones would have, plus their covariance."""
    moments = Moments()
    moments.add(turns.samples)
    alone = moments.std_error.square()
    # its estimate is noisy, most of all where the samples agree; a mean spreads no more than they do
    shared = turns.covariance.clamp(alone * COMMON, alone * (moments.count - 1))
    return Estimate(moments.mean, (alone + shared).sqrt(), num_matvecs, moments.count, moments.skewness)


def _exact(quantity: Quantity, products: Products) -> Estimate:
    """From the n unit vectors."""
    n, block = products.n, _block(products.n)
    total = torch.zeros((), dtype=torch.float64, device=products.device)
    none = Deflation(*torch.zeros(2, n, 0, dtype=torch.float64, device=products.device))
    for start in range(0, n, block):
        units = torch.zeros(n, min(block, n - start), dtype=products.work_dtype, device=products.device)
        units[start : start + block].fill_diagonal_(1)
        image = products(units).double()
        if start == 0:
            _check_symmetry(products, units, image)
        total = total + quantity.sample(units.double(), image, none).sum(0)
    return Estimate(total, torch.zeros_like(total), products.count, n)


def _by_root(quantity: Quantity, products: Products, num_matvecs: int) -> Estimate | None:
    """Of a matrix of few outputs, from all that it is: Q spans its range."""
    found = checked_root(products, min(2 * (num_matvecs - 1), products.n, STORE // products.n))
    if found is None:
        return None
    Q = torch.linalg.qr(found[0].rows.double().mT)[0]
    total = quantity.known(Deflation(Q, found[0] @ Q))
    return Estimate(total, torch.zeros_like(total), products.count, products.count)


def _deflated(products: Products, omega: Tensor) -> Deflation:
    """Q spans A omega, where the largest eigenvalues are."""
    if omega.shape[1] == 0:
        return Deflation(omega.double(), omega.double())
    block = _block(products.n)
    Y = in_blocks(products, omega, block)
    _check_symmetry(products, omega, Y)  # here, where A has not been deflated to rounding
    Q = torch.linalg.qr(Y)[0]
    return Deflation(Q, in_blocks(products, Q.to(products.work_dtype), block))


def _check_symmetry(products: Products, z: Tensor, image: Tensor) -> None:
    if z.shape[1] > 1:
        z, image = z[:, :2].double(), image[:, :2]
        asymmetry = (z[:, 0] @ image[:, 1] - z[:, 1] @ image[:, 0]).abs() / (z[:, 0].norm() * z[:, 1].norm())
        scale = (image.norm(dim=0) / z.norm(dim=0)).max()
        products.check_symmetry(float(asymmetry), float(scale))


def _signs(products: Products, count: int, generator: torch.Generator) -> Tensor:
    return signs(products.n, count, generator).to(products.device, products.work_dtype)
