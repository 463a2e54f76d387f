"""Operators made of operators: linear combinations and principal sub-blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradcond.curvature.operators import Operator, Products


class Combination(Operator):
    """c_1 A_1 + ... + c_m A_m + s I.

    Combinations inside are taken apart, and what occurs twice is multiplied once.

    Args:
        terms: pairs (c_i, A_i) of a number and a symmetric (n, n) thing with ``shape`` and ``@``.
        shift: s.

    Raises:
        TypeError: a coefficient is no number, or a term no matrix.
        ValueError: a coefficient is not finite; the terms differ in shape, dtype or device; a matrix is not
            symmetric.

    Example:
        >>> A = Combination([(2.0, torch.eye(2)), (1.0, torch.ones(2, 2))])
        >>> (A - torch.ones(2, 2)).shift(1.0).to_dense()
        tensor([[3., 0.],
                [0., 3.]])
    """

    def __init__(self, terms: Sequence[tuple[Any, Any]], shift: Any = 0.0) -> None:
        self.shift_by = _number(shift)
        self.coefficients: list[float] = []
        parts: list[Operator] = []
        for c, A in terms:
            if isinstance(A, int | float):
                raise TypeError(f"expected a matrix, got the number {A}; A.shift({A}) is A + {A} I")
            c, A = _number(c), as_operator(A)
            inner = zip(A.coefficients, A.parts, strict=True) if isinstance(A, Combination) else [(1.0, A)]
            self.shift_by += c * A.shift_by if isinstance(A, Combination) else 0.0
            for own, part in inner:
                if part not in parts:
                    parts.append(part)
                    self.coefficients.append(0.0)
                self.coefficients[parts.index(part)] += c * own
        first = parts[0]
        for other in parts[1:]:
            for name in ("shape", "dtype", "device"):
                if getattr(first, name) != getattr(other, name):
                    raise ValueError(
                        f"expected operators of one shape, dtype and device, got {name} {getattr(first, name)} "
                        f"and {getattr(other, name)}; convert one of them"
                    )
        super().__init__(first.shape[0], first.dtype, first.device, parts=parts)

    def _columns(self, V: Tensor) -> Tensor:
        result = self.shift_by * V
        for c, A in zip(self.coefficients, self.parts, strict=True):
            if c != 0:
                result.add_(A @ V, alpha=c)
        return result


class Block(Operator):
    """The principal sub-block A[index, index], by products of A with vectors that are zero elsewhere.

    Its eigenvalues interlace those of A.

    Args:
        A: any symmetric (n, n) thing with ``shape`` and ``@``.
        index: a slice, a mask (n,), or whole numbers, each at most once; the block has them in this order.

    Raises:
        ValueError: nothing is chosen, something twice, or something that is not there.

    Example:
        >>> Block(torch.diag(torch.tensor([1.0, 2.0, 3.0])), [2, 0]).to_dense()
        tensor([[3., 0.],
                [0., 1.]])
    """

    def __init__(self, A: Any, index: Any) -> None:
        A = as_operator(A)
        n = A.shape[0]
        try:
            self.index = torch.arange(n, device="cpu")[index].reshape(-1).to(A.device)
        except (IndexError, TypeError, ValueError) as error:
            raise ValueError(f"expected a slice, a mask ({n},) or whole numbers below {n}: {error}") from error
        distinct = len(self.index.unique())
        if not distinct or distinct < len(self.index):
            raise ValueError(
                f"expected at least one index and none twice, got {len(self.index)}, of them {distinct} distinct"
            )
        super().__init__(len(self.index), A.dtype, A.device, parts=[A])

    def _columns(self, V: Tensor) -> Tensor:
        (A,) = self.parts
        whole = V.new_zeros(A.shape[0], V.shape[1])
        whole[self.index] = V
        return (A @ whole)[self.index]


class Wrapped(Operator):
    """A dense matrix, a SciPy operator or anything with ``shape`` and ``@`` as an operator."""

    def __init__(self, A: Any) -> None:
        self.products = Products(A)
        super().__init__(self.products.n, self.products.dtype, self.products.device)

    def _columns(self, V: Tensor) -> Tensor:
        return self.products(V)


def as_operator(A: Any) -> Operator:
    """An operator as it is, and anything square and symmetric as one."""
    return A if isinstance(A, Operator) else Wrapped(A)


def _number(c: Any) -> float:
    """A finite real number as a float."""
    single = isinstance(c, int | float | np.number | Tensor) and np.ndim(c) == 0
    if not single or isinstance(c, complex | np.complexfloating):
        raise TypeError(f"expected a real number to multiply by, got {type(c).__name__}")
    if not math.isfinite(c):
        raise ValueError(f"expected a finite number to multiply by, got {c}")
    return float(c)
