"""A basis and the directions in which A leaves it: what Lanczos, blocks, restarts and warm starts share."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import eigh
from torch import Tensor

from gradcond.curvature.basis import Basis, orthogonalize_along_, reorthogonalize_
from gradcond.curvature.operators import Products

DEPENDENT = 1e-9  # of a unit vector outside the basis: such a direction is rounding
COUPLED = 1e-3  # of |A|: a product has this much along a vector of the basis
TILTED = 1e-3  # a direction this small in its block is no longer orthogonal to the basis


class Krylov:
    """A Q = Q T + P C^T with [Q, P] orthonormal: a basis Q (n, m) and pending directions P (n, p).

    ``expand`` moves pending directions into the basis, one product each, and what the products add becomes
    pending. From one vector this is Lanczos, from several its block form. The residual of a Ritz vector Q y is
    |C^T y|, after a rotation of the basis, too, so that a thick restart changes nothing.
    """

    def __init__(self, products: Products, basis: Basis, generator: torch.Generator, *, breakdown: float) -> None:
        self.products, self.basis, self.generator, self.breakdown = products, basis, generator, breakdown
        self.pending = torch.zeros(0, basis.n, dtype=torch.float64, device=basis.device)  # P as rows
        self.T, self.C = np.zeros((0, 0)), np.zeros((0, 0))
        self.scale = 0.0  # largest entry of T and C, our |A|
        self.top = 0.0  # largest |Ritz value| seen
        self.dropped = 0.0  # largest part of a product that a breakdown has dropped
        self.broken = False  # whether there was one: the start saw less than the whole space

    @property
    def size(self) -> int:
        """The number of vectors in the basis."""
        return self.basis.size

    @property
    def room(self) -> int:
        """The number of directions outside the basis and the pending ones."""
        return self.basis.n - self.size - len(self.pending)

    def add(self, rows: Tensor) -> None:
        """Make directions pending that nothing is coupled to, as far as they are new."""
        for row in rows.to(self.basis.device, torch.float64):
            known, w = [*self.basis.parts, self.pending], row[None] / row.norm()
            reorthogonalize_(known, w)
            if self.room == 0 or float(w.norm()) <= DEPENDENT:
                continue
            # three times: a random vector of the last free dimension starts almost inside the basis
            for _ in range(2):
                w /= w.norm()
                reorthogonalize_(known, w)
            self.pending = torch.cat([self.pending, w / w.norm()])
        self.C = np.hstack([self.C, np.zeros((self.size, len(self.pending) - self.C.shape[1]))])

    def add_random(self, count: int) -> None:
        """Make random directions pending, as many as there is room for."""
        self.add(torch.stack([self.products.gaussian(self.generator) for _ in range(count)]))

    def expand(self, b: int) -> None:
        """Multiply the first b pending directions and put them into the basis."""
        m, p = self.size, len(self.pending)
        rest, coupling = self.pending[b:].clone(), self.C[:, :b]
        self.basis.append(self.pending[:b])
        self.pending = rest  # the others are in the basis, and need no memory of their own
        w = self._product(self.basis.last(b))
        coupled = np.flatnonzero(np.abs(coupling).max(1, initial=0.0) > COUPLED * self.scale)
        h = orthogonalize_along_([*self.basis.parts, rest], w, [*coupled, *range(m, m + b)])
        q, r = torch.linalg.qr(w.mT) if b > 1 else _unit(w)
        # the one transfer to the host: coefficients in the basis, in the rest, and the new block
        numbers = torch.cat([h, r]).cpu().numpy()
        self._check_symmetry(numbers, coupling)
        within, beside, r = np.split(numbers, [m + b, m + p])
        self.T = np.block([[self.T, coupling], [coupling.T, (within[m:] + within[m:].T) / 2]])
        u, s, vt = np.linalg.svd(r)
        self.scale = max(self.scale, float(np.abs(within[m:]).max()), s[0] if m + p < self.basis.n else 0.0)
        kept = (s > self.breakdown * self.scale) & (np.arange(b) < self.basis.n - m - p)
        if not kept.all() and m + p < self.basis.n:
            self.dropped, self.broken = max(self.dropped, s[~kept].max()), True
        new = _turned(u[:, kept].T, q.mT)
        if (s[kept] < TILTED * s[0]).any():
            reorthogonalize_([*self.basis.parts, rest], new)
            q, r = torch.linalg.qr(new.mT)
            new = (q * r.diagonal().sign()).mT.contiguous()
        self.pending = torch.cat([rest, new]) if len(rest) else new
        self.C = np.block([[self.C[:, b:], np.zeros((m, kept.sum()))], [beside.T, (vt.T * s)[:, kept]]])

    def _product(self, directions: Tensor) -> Tensor:
        """A times the directions, rows (b, n), in float64 where the basis is."""
        columns = directions.to(self.products.device, self.products.work_dtype).mT
        image = self.products(columns[:, 0] if len(directions) == 1 else columns)
        rows = image.reshape(self.basis.n, -1).mT
        # a copy, since it will be changed: A may return what is its own, or ours
        return rows.to(self.basis.device, torch.float64, copy=True, memory_format=torch.contiguous_format)

    def _check_symmetry(self, numbers: np.ndarray, coupling: np.ndarray) -> None:
        m, b = coupling.shape
        new = numbers[m : m + b]
        # what was forgotten is no asymmetry
        known = np.maximum(np.abs(numbers[:m] - coupling) - self.dropped, 0.0)
        asymmetry = np.maximum(known.max(initial=0.0), np.abs(new - new.T).max())
        scale = np.maximum(self.scale, np.abs(numbers).max())
        self.products.check_symmetry(float(asymmetry), float(scale) or 1.0)

    def restart(self, coefficients: np.ndarray) -> None:
        """Keep these combinations of the basis, (m, k) orthonormal, in the memory that it has."""
        self.basis.rotate_(coefficients)
        self.T = coefficients.T @ self.T @ coefficients
        self.C = coefficients.T @ self.C

    def forget(self, residual: float) -> None:
        """Leave the pending directions out, where the basis is invariant up to this residual."""
        self.pending, self.C = self.pending[:0], self.C[:, :0]
        self.dropped = max(self.dropped, residual)

    def eigh(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values, their vectors y in the basis as columns, and their C^T y as rows."""
        values, vectors = eigh(self.T, driver="evd" if len(self.T) > 1 else None)  # SciPy 1.11 fails at one
        self.top = max(self.top, float(np.abs(values).max()))
        return values, vectors, vectors.T @ self.C


def _unit(w: Tensor) -> tuple[Tensor, Tensor]:
    """What QR gives for one vector, in its memory."""
    norm = w.norm()
    return w.div_(norm).mT, norm.reshape(1, 1)


def _turned(rotation: np.ndarray, rows: Tensor) -> Tensor:
    """An orthogonal (or empty) matrix times the rows; of one row in its memory."""
    if rotation.shape == (1, 1):
        return rows.mul_(float(rotation[0, 0]))
    return torch.as_tensor(rotation, device=rows.device) @ rows
