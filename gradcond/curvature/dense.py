"""The eigenvalues of what is small enough to be written out."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcond.curvature.operators import Products, written_out


def eigenvalues(products: Products, chunk: int) -> tuple[Tensor, float]:
    """All n of them, ascending, float64 on the CPU, and a bound on the error of each; rounded zeros are zero."""
    if isinstance(products.A, Tensor) and products.A.layout == torch.strided:
        dense = products.A
    else:
        dense = written_out(products, products.n, products.work_dtype, products.device, chunk)
    dense = dense.to("cpu", torch.float64)
    scale = dense.norm() / products.n**0.5
    asymmetry = (dense - dense.mT).norm() / (2 * products.n) ** 0.5
    products.check_symmetry(float(asymmetry), float(scale) or 1.0)
    curved = (dense.any(0) | dense.any(1)).nonzero()  # the others, as of dead units, have eigenvalue zero
    if len(curved) < products.n:
        dense = dense[curved, curved.mT]
    values = torch.linalg.eigvalsh((dense + dense.mT) / 2)
    # a random symmetric matrix of Frobenius norm f has the spectral norm 2 f / sqrt(n)
    error = rounded_(values, products.n, products.eps, 2 * float(asymmetry))
    return with_zeros(values, products.n), error


def rounded_(values: Tensor, size: int, eps: float, error: float) -> float:
    """Sets what the decomposition of a (size, size) matrix makes of zero to zero; bounds the error of each value.

    Args:
        values: eigenvalues, float64.
        size: of the matrix: the decomposition rounds by up to size x eps / 8 (measured).
        eps: of the matrix's products.
        error: what else it lacks.
    """
    top = max(values.abs().tolist(), default=0.0)
    rounding = size * torch.finfo(values.dtype).eps * top
    values[values.abs() <= rounding] = 0.0
    return max(eps * top, rounding, error)


def with_zeros(values: Tensor, n: int, most: int | None = None) -> Tensor:
    """Eigenvalues that are not zero together with the zeros of the n, or with ``most`` of these; ascending."""
    zeros = n - len(values)
    return torch.cat([values, values.new_zeros(zeros if most is None else min(zeros, most))]).sort().values
