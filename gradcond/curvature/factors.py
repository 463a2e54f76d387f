"""Factors P of a preconditioner M = P P^T, for `Preconditioned`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Factor:
    """P by two functions: P z and P^T v, for vectors (n,) and (n, k).

    Args:
        apply: z to P z.
        adjoint: v to P^T v; `Preconditioned` checks that it is.

    Example:
        >>> import torch
        >>> shear = Factor(lambda z: torch.stack([z[0] + z[1], z[1]]), lambda v: torch.stack([v[0], v[0] + v[1]]))
        >>> shear.factor(torch.tensor([1.0, 2.0])), shear.factor_transpose(torch.tensor([1.0, 2.0]))
        (tensor([3., 2.]), tensor([1., 3.]))
    """

    def __init__(self, apply: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]) -> None:
        self._apply, self._adjoint = apply, adjoint

    def factor(self, z: Tensor) -> Tensor:
        """P z."""
        return self._apply(z)

    def factor_transpose(self, v: Tensor) -> Tensor:
        """P^T v."""
        return self._adjoint(v)


class ProductFactor(Factor):
    """P = P_1 P_2 ..., the nested changes of variables theta = P_1 (P_2 (... z)).

    Args:
        factors: each with factor and factor_transpose, outermost first.

    Example:
        >>> import torch
        >>> shear = Factor(lambda z: torch.stack([z[0] + z[1], z[1]]), lambda v: torch.stack([v[0], v[0] + v[1]]))
        >>> ProductFactor(DiagonalFactor(torch.tensor([10.0, 1.0])), shear).factor(torch.tensor([1.0, 2.0]))
        tensor([30.,  2.])
    """

    def __init__(self, *factors: Any) -> None:
        self.factors = [require_factor(P) for P in factors]

    def factor(self, z: Tensor) -> Tensor:
        """P_1 P_2 ... z."""
        for P in reversed(self.factors):
            z = P.factor(z)
        return z

    def factor_transpose(self, v: Tensor) -> Tensor:
        """... P_2^T P_1^T v."""
        for P in self.factors:
            v = P.factor_transpose(v)
        return v


class DiagonalFactor(Factor):
    """P = diag(d).

    Args:
        diagonal: d, (n,), finite.

    Example:
        >>> import torch
        >>> DiagonalFactor(torch.tensor([2.0, 3.0])).factor(torch.ones(2, 1))
        tensor([[2.],
                [3.]])
    """

    def __init__(self, diagonal: Tensor) -> None:
        if not isinstance(diagonal, Tensor) or diagonal.ndim != 1 or not diagonal.is_floating_point():
            got = f"{tuple(diagonal.shape)}, {diagonal.dtype}" if isinstance(diagonal, Tensor) else repr(diagonal)
            raise ValueError(f"expected a diagonal (n,) of floating-point numbers, got {got}")
        if not bool(diagonal.isfinite().all()):
            raise ValueError("expected a finite diagonal, got NaN or infinity")
        self.diagonal = diagonal.detach()

    def factor(self, z: Tensor) -> Tensor:
        """P z."""
        require_length(z, len(self.diagonal))
        d = self.diagonal.to(z)
        return d * z if z.ndim == 1 else d[:, None] * z

    def factor_transpose(self, v: Tensor) -> Tensor:
        """P v: it is symmetric."""
        return self.factor(v)


def require_factor(M: Any) -> Any:
    """M, if it has factor and factor_transpose.

    Raises:
        TypeError: it has not.
    """
    if not (hasattr(M, "factor") and hasattr(M, "factor_transpose")):
        raise TypeError(f"expected M with factor and factor_transpose, got {type(M).__name__}")
    return M


def require_length(v: Tensor, n: int) -> None:
    """Raise ValueError unless v is (n,) or (n, k)."""
    if v.ndim not in (1, 2) or v.shape[0] != n:
        raise ValueError(f"expected a vector ({n},) or vectors ({n}, k), got {tuple(v.shape)}")
