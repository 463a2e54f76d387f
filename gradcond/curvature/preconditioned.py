"""The curvature that training sees in conditioned coordinates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradcond.curvature.operators import Operator, Products, generator_from


class Preconditioned(Operator):
    """P^T H P, the Hessian in the variables z of theta = P z.

    Symmetric, with the inertia of H where P is invertible. One product is one of H. That ``factor`` and
    ``factor_transpose`` are adjoint, <P u, v> = <u, P^T v>, is checked at construction.

    Args:
        H: any symmetric (n, n) thing with ``shape`` and ``@``.
        M: has ``factor(z)``, P z, and ``factor_transpose(v)``, P^T v, for (n,) or (n, k).

    Raises:
        TypeError: M has no factor and factor_transpose.
        ValueError: they are not adjoint.

    Example:
        >>> class Halves:
        ...     def factor(self, z): return z / 2
        ...     factor_transpose = factor
        >>> Preconditioned(torch.diag(torch.tensor([4.0, 8.0])), Halves()).to_dense()
        tensor([[1., 0.],
                [0., 2.]])
    """

    def __init__(self, H: Any, M: Any) -> None:
        if not (hasattr(M, "factor") and hasattr(M, "factor_transpose")):
            raise TypeError(f"expected M with factor and factor_transpose, got {type(M).__name__}")
        self.H, self.M = Products(H), M
        super().__init__(self.H.n, self.H.dtype, self.H.device)
        generator = generator_from(0)
        u, v = self.H.gaussian(generator), self.H.gaussian(generator)
        left = self._apply("factor", u).double() @ v.double()
        right = u.double() @ self._apply("factor_transpose", v).double()
        scale = self._apply("factor", u).double().norm() * v.double().norm()
        tolerance = 1e3 * torch.finfo(u.dtype).eps
        if not float((left - right).abs()) <= tolerance * float(scale):
            raise ValueError(
                f"expected <P u, v> = <u, P^T v>, got {float(left):.6g} and {float(right):.6g}; "
                "factor_transpose must be the transpose of factor"
            )

    def _apply(self, name: str, v: Tensor) -> Tensor:
        out = getattr(self.M, name)(v)
        if out.shape != v.shape:
            raise ValueError(f"expected {name} to return shape {tuple(v.shape)}, got {tuple(out.shape)}")
        return out.to(v.dtype)

    def _columns(self, V: Tensor) -> Tensor:
        return self._apply("factor_transpose", self.H(self._apply("factor", V)))
