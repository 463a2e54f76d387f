"""Square roots of matrices of low rank, and through them all of their eigenvalues that are not zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcond.curvature.dense import rounded_
from gradcond.curvature.operators import Operator, Products, generator_from

COLUMNS = 2**14  # of R that are in float64 at a time


@dataclass(frozen=True)
class Root:
    """A = R^T diag(signs) R, of r rows: A has no more eigenvalues that are not zero.

    Example:
        >>> root = Root(torch.tensor([[3.0, 0.0, 4.0]]), torch.ones(1, dtype=torch.float64))
        >>> root.eigenvalues(), root @ torch.tensor([1.0, 0.0, 0.0])
        (tensor([25.], dtype=torch.float64), tensor([ 9.,  0., 12.]))
    """

    rows: Tensor  # (r, n), in the working dtype of A
    signs: Tensor  # (r,) float64 on the CPU, each 1 or -1

    def __matmul__(self, v: Tensor) -> Tensor:
        rows = self.rows.to(v.dtype)
        inner = rows @ v
        return rows.mT @ (self.signs.to(v).view(-1, *[1] * (v.ndim - 1)) * inner)

    def eigenvalues(self) -> Tensor:
        """All r of A that are not zero but for rounding, ascending, float64 on the CPU.

        They are those of R R^T = Q diag(g) Q^T, or, with signs, of sqrt(g) Q^T diag(signs) Q sqrt(g).
        """
        gram = torch.zeros(len(self.rows), len(self.rows), dtype=torch.float64, device="cpu")
        for columns in self.rows.split(COLUMNS, 1):
            wide = columns.double()
            gram += (wide @ wide.mT).cpu()
        if bool((self.signs > 0).all()):
            return torch.linalg.eigvalsh(gram)
        g, Q = torch.linalg.eigh(gram)
        half = Q * g.clamp_min(0).sqrt()
        return torch.linalg.eigvalsh(half.mT @ (self.signs[:, None] * half))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Root:
        """That of P^T A P, where the function is P^T of vectors (n, r)."""
        return Root(function(self.rows.mT).mT, self.signs)


def root_of(matrix: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Columns c of length (m,), and signs s, with ``matrix`` (m, m) = sum s c c^T up to rounding in it, eps."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    kept = values.abs() > 8 * eps * values.abs().amax()
    return (vectors * values.abs().sqrt())[:, kept], values[kept].sign()


def checked_root(
    products: Products, most: int, known: tuple[Tensor, Tensor] | None = None
) -> tuple[Root, Tensor, float] | None:
    """The root of a matrix, all eigenvalues that are not zero, ascending, and a bound on the error of each.

    None where the matrix has no root of at most ``most`` rows. A row counts as half a product.

    Args:
        products: of the matrix A.
        most: rows.
        known: a random vector z and A z, by an ordinary product, with which the root has to agree; by default made.

    Raises:
        ValueError: they differ by more than rounding explains.
    """
    root = products.A.root(most, products.add) if isinstance(products.A, Operator) else None
    if root is None:
        return None
    if known is None:
        z = products.gaussian(generator_from(0))
        known = z, products(z)
    z, image = known
    values = root.eigenvalues()
    error = 2 * float((image - root @ z).norm() / z.norm())  # |E z| / |z| is half the norm of a random matrix E
    products.check_symmetry(error, max(values.abs().tolist(), default=0.0))
    return root, values, rounded_(values, len(values), products.eps, error)


def eigenvalues_by_root(
    products: Products, most: int, known: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, float] | None:
    """The eigenvalues and the error of `checked_root`."""
    found = checked_root(products, most, known)
    return None if found is None else found[1:]
