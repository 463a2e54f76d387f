"""The search for extreme eigenpairs: when to restart, when it is done, and whether anything hides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradcond.curvature.krylov import Krylov
from gradcond.curvature.wanted import edges, hiding_chance, neighbours, wanted

ACCEPT = 0.9  # of the residual allowed: the rest is for what the working dtype rounds
LEAVE = 0.5  # the same before a look, which leaves these residuals out
MISS = 0.01  # chance of missing a copy of a wanted eigenvalue, if there is one
SMALL = 4096  # below, copies are looked for; above, where a breakdown or a double value shows that they occur


@dataclass
class Look:
    """A Krylov space from random vectors orthogonal to what was found: copies and strays show there."""

    first: int  # where it begins in the basis
    width: int  # its random vectors
    found: np.ndarray  # the wanted values before it


class Search:
    """Expands a Krylov space until the wanted pairs have converged and nothing that is wanted can hide."""

    def __init__(
        self, space: Krylov, k: int, which: str, *, tol: float, block: int, max_vectors: int, budget: int
    ) -> None:
        self.space, self.k, self.which, self.tol = space, k, which, tol
        self.block, self.max_vectors, self.budget = block, max_vectors, budget
        self.due = k  # the size at which the Ritz values are next looked at
        self.look: Look | None = None
        self.chance = 1.0  # of missing something in the looks before, since anything was found
        self.missed = 1.0  # the same, with the one under way
        self.settled = False  # whether nothing that is wanted can hide

    def run(self) -> np.ndarray:
        """Coefficients (m, k) of the wanted Ritz vectors, converged or not, in order."""
        space = self.space
        while space.size < space.basis.n and space.products.count < self.budget:
            if not len(space.pending):
                space.add_random(self.block)
            if self._full(len(space.pending)):
                self._restart()
            space.expand(min(len(space.pending), self.budget - space.products.count))
            if (space.size >= self.due or space.products.count >= self.budget) and self._done():
                break
        self.settled |= space.size == space.basis.n
        values, vectors, _ = space.eigh()
        return vectors[:, wanted(values, self.k, self.which)]

    def _full(self, count: int) -> bool:
        """Whether the basis has no room for so many more; where it may have n vectors the space ends first."""
        return self.max_vectors < self.space.basis.n and self.space.size + count > self.max_vectors

    def _restart(self) -> None:
        values, vectors, _ = self.space.eigh()
        count = min(self.k + (self.max_vectors - self.k) // 2, self.max_vectors - self.block, len(values))
        self.space.restart(vectors[:, neighbours(values, self.k, self.which, count)])
        self.due, self.look, self.chance = self.k, None, self.missed

    def _done(self) -> bool:
        values, vectors, leaving = self.space.eigh()
        order = wanted(values, self.k, self.which)
        found, residuals = values[order], np.linalg.norm(leaving, axis=1)
        allowed = self.tol * self.space.top
        worst = np.hypot(residuals[order].max(), self.space.dropped)
        self.due = self.space.size + (1 if worst <= 100 * allowed else 1 + self.space.size // 16)
        if worst > ACCEPT * allowed:
            return False
        if self.look is not None and np.abs(found - self.look.found).max() > allowed:
            self.look, self.chance, self.missed = None, 1.0, 1.0
        points = edges(found, self.which, 2 * allowed) if self._doubtful(found, allowed) else []
        if self.look is not None and points:
            self.missed = self.chance * self._chance(points)
        self.settled = not points or self.missed <= MISS
        if self.look is None and not self.settled and residuals[order].max() <= LEAVE * allowed:
            others = np.setdiff1d(np.flatnonzero(residuals <= LEAVE * allowed), order)
            room = len(others) if self.max_vectors >= self.space.basis.n else self.max_vectors // 2 - self.k
            self._look(np.append(order, others[: max(room, 0)]), values, vectors, residuals)
        return self.settled

    def _doubtful(self, found: np.ndarray, allowed: float) -> bool:
        """Whether copies are to be looked for: where that is cheap, or they are known to occur."""
        double = len(found) > 1 and np.diff(np.sort(found)).min() <= 2 * allowed
        return self.space.basis.n <= SMALL or self.space.broken or bool(double)

    def _look(self, kept: np.ndarray, values: np.ndarray, vectors: np.ndarray, residuals: np.ndarray) -> None:
        """Go on from random vectors, orthogonal to the pairs kept, the wanted ones first."""
        self.space.restart(vectors[:, kept])
        self.space.forget(residuals[kept].max())
        self.space.add_random(self.block)
        self.look = Look(len(kept), len(self.space.pending), values[kept[: self.k]])
        self.due = self.space.size + 1

    def _chance(self, points: list[float]) -> float:
        assert self.look is not None
        first, space = self.look.first, self.space
        if not len(space.pending):
            return 0.0  # invariant: random vectors have seen all that there is
        T, C = space.T[first:, first:], space.C[first:]
        return max(hiding_chance(T, C, self.look.width, point, space.basis.n) for point in points)
