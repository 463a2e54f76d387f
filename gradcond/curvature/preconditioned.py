"""The curvature that training sees in conditioned coordinates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradcond.curvature.composed import Block, as_operator
from gradcond.curvature.factors import Factor, require_factor
from gradcond.curvature.operators import Operator, generator_from, normal, working_dtype
from gradcond.curvature.root import Root


class Preconditioned(Operator):
    """P^T H P, the Hessian in the variables z of theta = P z.

    Symmetric, with the inertia of H where P is invertible. One product is one of H. That ``factor`` and
    ``factor_transpose`` are adjoint, <P u, v> = <u, P^T v>, is checked at construction.

    Args:
        H: any symmetric (n, n) thing with ``shape`` and ``@``.
        M: has ``factor(z)``, P z, and ``factor_transpose(v)``, P^T v, for (n,) or (n, k): the ``preconditioner()``
            of a wrapped optimizer, `optimizer_factor`, `KroneckerFactor`, `DiagonalFactor`, `Factor` of two
            functions, or a `ProductFactor` of several.

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
        self.M, self.H = require_factor(M), as_operator(H)
        super().__init__(self.H.shape[0], self.H.dtype, self.H.device, parts=[self.H])
        generator = generator_from(0)
        u, v = (normal(self.shape[0], generator) for _ in range(2))
        u, v = (w.to(self.device, working_dtype(self.dtype)) for w in (u, v))
        image = self._apply("factor", u).double()
        left, right = image @ v.double(), u.double() @ self._apply("factor_transpose", v).double()
        tolerance = 1e3 * torch.finfo(u.dtype).eps
        if not float((left - right).abs()) <= tolerance * float(image.norm() * v.double().norm()):
            raise ValueError(
                f"expected <P u, v> = <u, P^T v>, got {float(left):.6g} and {float(right):.6g}; "
                "factor_transpose must be the transpose of factor"
            )

    def block(self, index: Any, /) -> Operator:
        """The principal sub-block; where P keeps to the index, P^T H P of the block of H, which can cost less."""
        whole = Block(self, index)
        own, n = whole.index, self.shape[0]
        z = torch.zeros(n, dtype=working_dtype(self.dtype), device=self.device)
        z[own] = normal(len(own), generator_from(1)).to(z)
        outside = torch.ones(n, dtype=torch.bool, device=self.device)
        outside[own] = False
        if any(bool(self._apply(name, z)[outside].any()) for name in ("factor", "factor_transpose")):
            return whole

        def restricted(name: str, v: Tensor) -> Tensor:
            padded = v.new_zeros(n, *v.shape[1:])
            padded[own] = v
            return self._apply(name, padded)[own]

        P = Factor(partial(restricted, "factor"), partial(restricted, "factor_transpose"))
        return Preconditioned(self.H.block(own), P)

    def root(self, most: int, progress: Callable[[int], Any] | None = None) -> Root | None:
        """That of H, mapped by P^T."""
        root = self.H.root(most, progress)
        return None if root is None else root.mapped(partial(self._apply, "factor_transpose"))

    def _apply(self, name: str, v: Tensor) -> Tensor:
        out = getattr(self.M, name)(v)
        if out.shape != v.shape:
            raise ValueError(f"expected {name} to return shape {tuple(v.shape)}, got {tuple(out.shape)}")
        return out.to(v.dtype)

    def _columns(self, V: Tensor) -> Tensor:
        return self._apply("factor_transpose", self.H @ self._apply("factor", V))
