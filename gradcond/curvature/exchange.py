"""Random probes that take turns: each samples what all the others have not found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradcond.curvature.operators import Products


@dataclass(frozen=True)
class Exchange:
    """Y = A Omega = Q R and Z = A Q for k probes Omega, (n, k) each; float64 on the device of A.

    Without probe i, Y spans P_i = Q (I - s_i s_i^T) Q^T, s_i being column i of R^-T, normalized (then
    s_i^T R_j = 0 for j != i). What P_i leaves out, probe i samples, as if it had been drawn for that.

    References:
        E. N. Epperly, J. A. Tropp, R. J. Webber, XTrace: making the most of every sample in stochastic trace
        estimation, 2024: XTrace with normalized probes (section 2.3), XDiag; the Frobenius norm is derived
        here in the same way.
    """

    omega: Tensor
    Y: Tensor
    Q: Tensor
    Z: Tensor
    R: Tensor  # (k, k) Q^T Y
    S: Tensor  # (k, k) the columns s_i
    X: Tensor  # (k, k) columns Q^T P_i omega_i
    scale: Tensor  # (k,) (n - k + 1) / |omega_i - P_i omega_i|^2

    def traces(self) -> Tensor:
        """tr(P_i A) + scale_i (omega - P omega)^T A (omega - P omega), (k,)."""
        H = self.Q.mT @ self.Z
        known = H.trace() - (self.S * (H @ self.S)).sum(0)
        rest = (self.omega * self.Y).sum(0) - 2 * (self.X * self.R).sum(0) + (self.X * (H @ self.X)).sum(0)
        return known + self.scale * rest

    def squared_norms(self) -> Tensor:
        """|A P_i|^2 + scale_i |A (omega - P omega)|^2, Frobenius, (k,)."""
        known = self.Z.square().sum() - (self.Z @ self.S).square().sum(0)
        return known + self.scale * (self.Y - self.Z @ self.X).square().sum(0)

    def diagonals(self) -> Tensor:
        """diag(P_i A) + omega * (A omega - P_i A omega), (k, n)."""
        left, right = self.Q @ self.S, self.Z @ self.S
        known = (self.Q * self.Z).sum(1, keepdim=True) - left * right
        # of Y_i = Q R_i, P_i leaves out s_i s_i^T R_i
        return (known + self.omega * left * (self.S * self.R).sum(0)).mT


def exchange(products: Products, omega: Tensor, block: int) -> Exchange:
    """2 k products with k sign vectors omega (n, k), ``block`` of them at a time."""
    n, k = omega.shape
    Y = in_blocks(products, omega, block)
    Q, R = torch.linalg.qr(Y)
    Z = in_blocks(products, Q.to(products.work_dtype), block)
    # a probe that adds nothing to the others leaves out a direction of rounding: no matter which
    info = torch.finfo(Y.dtype)
    floor = max(info.eps * k * float(R.abs().max()), info.tiny)
    diagonal = R.diagonal()
    lifted = R + torch.diag(torch.where(diagonal.abs() < floor, floor, 0.0))
    S = torch.linalg.solve_triangular(lifted.mT, torch.eye(k).to(R), upper=False)
    S = S / S.norm(dim=0)
    omega = omega.double()
    W = Q.mT @ omega
    along = (S * W).sum(0)
    outside = n - W.square().sum(0) + along.square()
    return Exchange(omega, Y, Q, Z, R, S, X=W - S * along, scale=(n - k + 1) / outside)


def in_blocks(products: Products, V: Tensor, block: int) -> Tensor:
    """A V, float64, ``block`` columns at a time."""
    return torch.cat([products(part).double() for part in V.split(block, dim=1)], dim=1)
