"""Lanczos tridiagonalization that keeps its basis orthogonal, so that it makes no ghosts."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from gradcond.curvature.basis import Basis, orthogonalize_along_, reorthogonalize_
from gradcond.curvature.operators import Products

BREAKDOWN = 64  # x eps x |T|: sqrt(eps) corrupts float32, 1 eps is never reached


class Lanczos:
    """The recurrence, one product a ``step()``; an invariant space is left by a random restart."""

    def __init__(
        self, products: Products, start: Tensor, *, generator: torch.Generator, breakdown: float = BREAKDOWN
    ) -> None:
        self.products, self.generator = products, generator
        self.breakdown = breakdown * torch.finfo(start.dtype).eps
        self._basis = Basis(products.n, start.dtype, start.device)
        self.alphas: list[float] = []
        self.betas: list[float] = []  # betas[j] couples q_j and q_{j+1}; exact zero after a breakdown
        self.scale = 0.0  # largest entry of T, our |T|
        self.top = 0.0  # largest |Ritz value| seen
        self.asymmetry = 0.0
        self.off_tridiagonal = 0.0  # sum of squares of what should be zero, and how many there were
        self.off_count = 0
        self.block = 0  # where the part of T since the last restart begins
        self.dropped = 0.0  # largest residual that a restart has dropped
        self.residual = start.to(torch.float64, copy=True)
        self._norm = float(self.residual.norm())

    @property
    def size(self) -> int:
        """The number of steps done."""
        return len(self.alphas)

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.size == self.products.n

    @property
    def parts(self) -> list[Tensor]:
        """The vectors so far as rows, some (., n) at a time."""
        return self._basis.parts

    @property
    def basis(self) -> Tensor:
        """The same in one, (size, n): a copy of more than a few."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)

    @property
    def invariant(self) -> bool:
        """Whether the span of the basis is invariant, to rounding."""
        return self.exhausted or self._norm <= self.breakdown * self.scale

    def step(self) -> None:
        """Append one vector to the basis, multiply it, and extend T."""
        j = self.size
        self._append(j)
        parts = self.parts
        w = self.products(parts[-1][-1]).to(torch.float64, copy=True)  # A may return what is its own, or ours
        h = orthogonalize_along_(parts, w[None], range(max(0, j - 1), j + 1))[:, 0]
        # one host transfer a step; the coefficients that symmetry makes zero measure the noise
        if j > 0:
            h[j - 1] -= self.betas[j - 1]
        zeros = torch.cat([h[:j], h.new_zeros(1)])
        alpha, norm, worst, squares = torch.stack(
            [h[j], w.norm(), zeros.abs().max(), zeros.square().sum()]
        ).tolist()
        self.alphas.append(alpha)
        self.residual, self._norm = w, norm
        self.scale = max(abs(alpha), self.scale, 0.0 if self.exhausted else norm)  # alpha first: NaN is to stay
        self.asymmetry = max(self.asymmetry, worst)
        self.off_tridiagonal, self.off_count = self.off_tridiagonal + squares, self.off_count + len(zeros) - 1
        self.products.check_symmetry(self.asymmetry, self.scale or 1.0)

    def _append(self, j: int) -> None:
        if j > 0:
            if self.invariant and self.block < j:
                self.restart(self.outside())
            self.betas.append(0.0 if self.block == j else self._norm)
        elif not self._norm > 0:
            raise ValueError("expected a start vector that is not zero")
        self._basis.append(self.residual.div_(self._norm)[None])
        self.residual = self.residual.new_zeros(0)  # until the next product

    def outside(self) -> Tensor:
        """A random unit vector orthogonal to the basis, float64."""
        # three passes: a random vector of the last free dimension starts almost inside the basis
        w = self.products.gaussian(self.generator).double()
        for _ in range(3):
            w /= w.norm()
            reorthogonalize_(self.parts, w[None])
        return w / w.norm()

    def restart(self, w: Tensor) -> None:
        """Go on from w, float64 and orthogonal to the basis; what couples it to the basis is dropped."""
        self.dropped = max(self.dropped, self._norm)
        self.residual, self._norm, self.block = w, float(w.norm()), self.size

    @property
    def noise(self) -> float:
        """Root mean square of the entries of Q^T A Q that exact arithmetic makes zero."""
        return (self.off_tridiagonal / max(self.off_count, 1)) ** 0.5

    def eigh(self, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values, vectors in the basis, and residual norms |A y - theta y|, of the part of T given."""
        stop = self.size if stop is None else stop
        alphas, betas = np.array(self.alphas[start:stop]), np.array(self.betas[start : stop - 1])
        values, vectors = eigh_of(alphas, betas)
        self.top = max(self.top, float(np.abs(values).max()))
        last = 0.0 if self.exhausted or self.block == self.size else self._norm
        return values, vectors, np.hypot(np.abs(vectors[-1]) * last, self.dropped)

    def combine(self, coefficients: np.ndarray) -> Tensor:
        """Vectors of the full space, (n, k) with unit columns, from coefficients (size, k) in the basis."""
        return self._basis.combine(coefficients)


def eigh_of(alphas: np.ndarray, betas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of a tridiagonal matrix: by relatively robust representations, or else by QR.

    Example:
        >>> eigh_of(np.array([1.0, 1.0]), np.array([1.0]))[0].round(8)
        array([0., 2.])
    """
    try:
        values, vectors = eigh_tridiagonal(alphas, betas)
    except np.linalg.LinAlgError:  # some versions of LAPACK do not converge where many off-diagonals are tiny
        values, vectors = eigh_tridiagonal(alphas, betas, lapack_driver="stev")
    return values, vectors
