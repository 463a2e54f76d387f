"""Random probes that take turns: each samples what all the others have not found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradcond.curvature.operators import Products

PIECE = 2048  # columns of a diagonal at a time, so that what is made of them stays in the cache


@dataclass(frozen=True)
class Exchange:
    """Y = A Omega = Q R and Z = A Q for k probes Omega, (n, k) each; float64 on the device of A.

    Without probe i, Y spans P_i = Q (I - s_i s_i^T) Q^T, s_i being column i of R^-T, normalized (then
    s_i^T R_j = 0 for j != i). What P_i leaves out, probe i samples, as if it had been drawn for that: an unbiased
    estimate e_i. Two of them share k - 2 probes, and have in common what each has learned from the other probe:
    with e_ij, the estimate of probe i from all but j, (e_i - e_ij) (e_j - e_ji) has the mean of the covariance of
    e_i and e_j, since e_ij and e_ji are independent given the other probes, and e_i given all but itself is
    unbiased. It takes no product: P_ij leaves out the plane of s_i and s_j.

    References:
        E. N. Epperly, J. A. Tropp, R. J. Webber, XTrace: making the most of every sample in stochastic trace
        estimation, 2024: XTrace with normalized probes (section 2.3), XDiag; the Frobenius norm and the covariances
        are derived here.
    """

    omega: Tensor
    Y: Tensor
    Q: Tensor
    Z: Tensor
    R: Tensor  # (k, k) Q^T Y
    S: Tensor  # (k, k) the columns s_i
    X: Tensor  # (k, k) columns Q^T P_i omega_i
    outside: Tensor  # (k,) |omega_i - P_i omega_i|^2

    def traces(self) -> Turns:
        """tr(P_i A) + (n - k + 1) / |r_i|^2 r_i^T A r_i of r_i = omega_i - P_i omega_i."""
        H = self.Q.mT @ self.Z
        H = (H + H.mT) / 2
        left = self.R - H @ self.X
        return self._turns(H, left, (self.omega * self.Y).sum(0) - (self.X * (self.R + left)).sum(0))

    def squared_norms(self) -> Turns:
        """|A P_i|^2 + (n - k + 1) / |r_i|^2 |A r_i|^2, Frobenius."""
        left = self.Y - self.Z @ self.X
        return self._turns(self.Z.mT @ self.Z, self.Z.mT @ left, left.square().sum(0))

    def diagonals(self) -> Turns:
        """diag(P_i A) + omega_i * (A omega_i - P_i A omega_i)."""
        left, right = (self.S.mT @ V.mT for V in (self.Q, self.Z))
        # of Y_i = Q R_i, P_i leaves out s_i s_i^T R_i
        rest = self.omega.mT * (self.S * self.R).sum(0)[:, None]
        samples = (self.Q * self.Z).sum(1) - left * right + left * rest
        pieces = zip(*(rows.split(PIECE, dim=1) for rows in (left, right, rest)), strict=True)
        return Turns(samples, torch.cat([self._shared(*piece) for piece in pieces]))

    def _shared(self, left: Tensor, right: Tensor, rest: Tensor) -> Tensor:
        """The covariance of two diagonals, from some columns."""
        k, (cosines, sines) = len(left), self._angles()
        total = torch.zeros_like(left[0])
        for i in range(1, k):
            c, s = cosines[:i, [i]], sines[:i, [i]]
            gained = (left[:i] - c * left[i]) * ((right[:i] - c * right[i]) + c * rest[i])
            mirrored = (left[i] - c * left[:i]) * ((right[i] - c * right[:i]) + c * rest[:i])
            total += (gained * mirrored / s**4).sum(0)
        return total * (2 / (k * (k - 1)))

    def _turns(self, M: Tensor, left: Tensor, own: Tensor) -> Turns:
        """Of tr(P M) plus the scaled square of r in a form M on Q, which is own_i, with slope left_i, at r_i."""
        n, k = self.Q.shape
        MS = M @ self.S
        forms = self.S.mT @ MS
        sizes = forms.diagonal()
        samples = M.trace() - sizes + (n - k + 1) / self.outside * own
        # entry (j, i): the unit vector u = (s_j - c s_i) / s that P_i loses without probe j
        c, s = self._angles()

        def along(V: Tensor) -> Tensor:
            """The products u^T V_i."""
            products = self.S.mT @ V
            return (products - c * products.diagonal()) / s

        size = (sizes[:, None] - 2 * c * forms + c**2 * sizes) / s**2
        more = along(self.X)
        squares = own + 2 * more * along(left) + more**2 * size
        without = M.trace() - sizes - size + (n - k + 2) / (self.outside + more**2) * squares
        gained = (samples - without).fill_diagonal_(0)
        return Turns(samples, (gained * gained.mT).sum() / (k * (k - 1)))

    def _angles(self) -> tuple[Tensor, Tensor]:
        """The cosines between the s_i, and the sines, (k, k), not zero."""
        c = self.S.mT @ self.S
        return c, (1 - c**2).clamp(min=torch.finfo(c.dtype).eps).sqrt()


@dataclass(frozen=True)
class Turns:
    """What k probes find in turn, and how much two of them have in common."""

    samples: Tensor  # (k, ...)
    covariance: Tensor  # (...) an unbiased estimate, which may be negative


def exchange(products: Products, omega: Tensor, block: int) -> Exchange:
    """2 k products with k sign vectors omega (n, k), ``block`` of them at a time."""
    n, k = omega.shape
    Y = in_blocks(products, omega, block)
    Q, R = torch.linalg.qr(Y)
    Z = in_blocks(products, Q.to(products.work_dtype), block)
    # a probe that adds nothing to the others leaves out a direction of rounding: no matter which
    floor = torch.finfo(Y.dtype).eps * k * float(R.abs().max()) or 1.0
    lifted = R + torch.diag((R.diagonal().abs() < floor).to(R) * floor)
    S = torch.linalg.solve_triangular(lifted.mT, torch.eye(k, dtype=R.dtype, device=R.device), upper=False)
    S = S / S.norm(dim=0)
    omega = omega.double()
    W = Q.mT @ omega
    along = (S * W).sum(0)
    return Exchange(omega, Y, Q, Z, R, S, X=W - S * along, outside=n - W.square().sum(0) + along.square())


def in_blocks(products: Products, V: Tensor, block: int) -> Tensor:
    """A V, float64, ``block`` columns at a time."""
    return torch.cat([products(part).double() for part in V.split(block, dim=1)], dim=1)
