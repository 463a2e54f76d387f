"""Tridiagonalization, the Lanczos recurrence run for a given number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradcond.curvature.lanczos import Lanczos, eigh_of
from gradcond.curvature.operators import Products, generator_from


@dataclass(frozen=True)
class Tridiagonal:
    """A Q = Q T + r e_m^T with Q^T Q = I; T has the diagonal ``alphas`` and the off-diagonal ``betas``.

    Example:
        >>> T = tridiagonalize(torch.eye(3), steps=3)
        >>> T.basis.shape, T.betas
        (torch.Size([3, 3]), tensor([0., 0.], dtype=torch.float64))
    """

    basis: Tensor  # (n, m) Q, in the working dtype
    alphas: Tensor  # (m,) float64, on the CPU
    betas: Tensor  # (m - 1,) float64, on the CPU; zero where the space was invariant
    residual: Tensor  # (n,) r, zero when the space is invariant
    asymmetry: float  # largest |<q_i, A q_j> - <A q_i, q_j>| met: the measured noise of one product

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (m,) ascending and eigenvectors (m, m) of T, both float64 on the CPU."""
        values, vectors = eigh_of(self.alphas.numpy(), self.betas.numpy())
        return torch.from_numpy(values), torch.from_numpy(vectors)


def tridiagonalize(A: Any, v0: Tensor | None = None, *, steps: int, seed: int = 0) -> Tridiagonal:
    """Lanczos with full reorthogonalization: an orthonormal basis Q in which A is tridiagonal.

    After m steps A Q = Q T + r e_m^T and Q^T Q = I to rounding. Dots, T and the reorthogonalization (two
    passes of classical Gram-Schmidt) are float64 whatever A is; the basis is float32 for A in float32 or
    shorter and float64 otherwise. When the space is invariant (|r| <= 64 eps |T|) it goes on from a random
    vector orthogonal to it, with a zero in T, so multiple eigenvalues come out as often as they occur. With
    steps = n, T has exactly the eigenvalues of A. One product and one host transfer a step.

    Args:
        A: any symmetric (n, n) thing with ``shape`` and ``@``.
        v0: start vector (n,); a standard normal one when None.
        steps: size of T, 1 to n.
        seed: of the start vector and of the restarts.

    Returns:
        The basis (n, steps), the two diagonals of T, the residual r (n,) and the measured asymmetry.

    Raises:
        ValueError: A is not square or not symmetric, steps is not in 1..n, or v0 is zero or misshapen.

    References:
        C. C. Paige, The computation of eigenvalues and eigenvectors of very large sparse matrices, 1971.
        L. Giraud, J. Langou, M. Rozloznik, On the loss of orthogonality in the Gram-Schmidt
        orthogonalization process, 2005 (twice is enough).

    Example:
        >>> T = tridiagonalize(torch.diag(torch.tensor([3.0, 0.0])), torch.tensor([1.0, 1.0]), steps=2)
        >>> T.alphas, T.betas
        (tensor([1.5000, 1.5000], dtype=torch.float64), tensor([1.5000], dtype=torch.float64))
    """
    products, generator = Products(A), generator_from(seed)
    n = products.n
    if not 1 <= steps <= n:
        raise ValueError(f"steps must be in 1..{n}, got {steps}; a Krylov space cannot exceed n")
    if v0 is not None and v0.shape != (n,):
        raise ValueError(f"expected a start vector of shape ({n},), got {tuple(v0.shape)}")
    start = products.gaussian(generator) if v0 is None else v0.to(products.device, products.work_dtype)
    lanczos = Lanczos(products, start, generator=generator)
    for _ in range(steps):
        lanczos.step()
    residual = lanczos.residual * (not lanczos.invariant)
    return Tridiagonal(
        basis=lanczos.basis.mT,
        alphas=torch.tensor(lanczos.alphas, dtype=torch.float64, device="cpu"),
        betas=torch.tensor(lanczos.betas, dtype=torch.float64, device="cpu"),
        residual=residual.to(products.work_dtype),
        asymmetry=lanczos.asymmetry,
    )
