"""The eigenvalues of what is small enough to be written out."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcond.curvature.operators import Products, written_out
from gradcond.curvature.root import with_zeros


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
    # the decomposition rounds by up to n eps / 8 (measured); a random symmetric matrix of Frobenius norm f has the
    # spectral norm 2 f / sqrt(n)
    top = max(values.abs().tolist(), default=0.0)
    rounding = products.n * torch.finfo(values.dtype).eps * top
    values[values.abs() <= rounding] = 0.0
    return with_zeros(values, products.n), max(products.eps * top, rounding, 2 * float(asymmetry))
