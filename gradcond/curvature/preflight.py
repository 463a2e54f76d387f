"""What a long run will meet: noise, asymmetry, time and memory, found out by five products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradcond.curvature.condition import noise_floor
from gradcond.curvature.lanczos import Lanczos
from gradcond.curvature.memory import available as free_memory
from gradcond.curvature.operators import Products, generator_from
from gradcond.curvature.sketch import relative_difference

STEPS = 3  # products that show the symmetry, the noise and the time; two more show whether they repeat


@dataclass(frozen=True)
class Preflight:
    """What was found; printed, it is a report."""

    noise: float  # relative difference of two products of one vector, of a model under different random states
    asymmetry: float  # largest |<q_i, A q_j> - <A q_i, q_j>| met, relative to the largest |Ritz value|
    noise_floor: float  # an |eigenvalue| below this cannot be told from zero; a lower bound, so early
    seconds: float  # of one product
    num_matvecs: int  # of the run that was asked about
    basis_bytes: int  # of its basis
    available_bytes: int | None  # free on the operator's device; None where the system does not say
    cost: int  # products spent

    def __str__(self) -> str:
        free = "" if self.available_bytes is None else f" of {size(self.available_bytes)} free"
        return (
            f"repeatable to {self.noise:.1e}, symmetric to {self.asymmetry:.1e}; |eigenvalues| below "
            f"{self.noise_floor:.2g} cannot be told from zero\n{self.num_matvecs} products of "
            f"{self.seconds:.3g} s take {duration(self.num_matvecs * self.seconds)}, their basis "
            f"{size(self.basis_bytes)}{free}"
        )


def preflight(
    A: Any, num_matvecs: int = 100, *, seed: int = 0, progress: Callable[[int], Any] | None = None
) -> Preflight:
    """Look before a long run: do the products repeat, are they symmetric, what will it cost?

    Two products of one vector under different random states must agree, then three steps of Lanczos measure
    the asymmetry, the noise and the time of a product: five products in all, fewer for an operator smaller
    than that, one already found repeatable or a matrix.

    Args:
        A: any symmetric (n, n) thing with ``shape`` and ``@``.
        num_matvecs: products of the run to come, each with a vector of its basis.
        seed: of the start vector.
        progress: called with the number of products just done.

    Raises:
        ValueError: the products do not repeat (the message names what is random: a module, the sampler, the
            data), are not symmetric, or not finite; num_matvecs < 1.
        MemoryError: the basis does not fit; the message says how much it needs.

    Example:
        >>> found = preflight(torch.diag(torch.tensor([3.0, 1.0])), num_matvecs=2)
        >>> found.noise, found.basis_bytes, found.cost
        (0.0, 16, 2)
    """
    if num_matvecs < 1:
        raise ValueError(f"num_matvecs must be at least 1, got {num_matvecs}")
    before = getattr(A, "num_matvecs", 0)
    products = Products(A, progress)
    basis = min(num_matvecs, products.n) * products.n * torch.finfo(products.work_dtype).bits // 8
    available = free_memory(products.device)
    if available is not None and basis > available:
        raise MemoryError(
            f"a basis of {num_matvecs} vectors of {products.n} numbers needs {size(basis)}, {size(available)} are "
            "free: ask for fewer products, bound the basis, or take a block of the parameters"
        )
    generator = generator_from(seed)
    lanczos = Lanczos(products, products.gaussian(generator), generator=generator)
    seconds = []
    for _ in range(min(STEPS, products.n)):
        start = time.perf_counter()
        lanczos.step()  # ends by reading numbers back, so the device has finished
        seconds.append(time.perf_counter() - start)
    lanczos.eigh()
    return Preflight(
        noise=_noise(A, products, lanczos.parts[0][0]),
        asymmetry=lanczos.asymmetry / (lanczos.top or 1.0),
        noise_floor=noise_floor(lanczos),
        seconds=statistics.median(seconds),
        num_matvecs=num_matvecs,
        basis_bytes=basis,
        available_bytes=available,
        cost=getattr(A, "num_matvecs", before + products.count) - before,
    )


def _noise(A: Any, products: Products, v: Tensor) -> float:
    if hasattr(A, "check_deterministic"):
        return A.check_deterministic()  # known by now
    if isinstance(products.A, Tensor):
        return 0.0
    first = products(v).clone()  # A may return what is its own
    return relative_difference([products(v)], [first])


def size(count: float) -> str:
    """Bytes in a unit people read.

    >>> size(13_400_000_000)
    '13.4 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def duration(seconds: float) -> str:
    """Seconds in a unit people read.

    >>> duration(7800)
    '2.17 h'
    """
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
