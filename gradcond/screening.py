"""A step of conditioners whose P is known before it: a first pass over the gradients screens them for the second.

The sums that a projection subtracts tell as well whether a gradient is finite. Here an ordinary step of one process
is taken, with little Python between the operations; whenever anything is out of the ordinary nothing is touched,
and the engine takes the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from gradcond.assignment import Assignment, Conditioned
from gradcond.conditioner import RowMap
from gradcond.finite import passes
from gradcond.layers import Rows

__all__ = ["Screening"]


class Screening:
    """The layers of a step.

    Args:
        assignments: all that the optimizer conditions.
        fixed: is every layer's P the same at every step?
    """

    def __init__(self, assignments: Sequence[Assignment], *, fixed: bool) -> None:
        self.possible = fixed and bool(assignments) and all(a.simple for a in assignments)
        self.layers = [(a, a.layer.name, a.weights[0]) for a in assignments]
        self.others = [bias for a in assignments for bias in a.biases]

    def step_(self, maps: Mapping[str, RowMap | None], conditioned: Conditioned, check: bool | None) -> bool:
        """Replaces the gradients; says whether it did, and has touched nothing if not.

        Args:
            maps: each layer's P, once it has been made.
            conditioned: takes down which gradients have been replaced, and in which version.
            check: are gradients looked at? None: on the CPU.
        """
        work: list[tuple[str, Tensor, RowMap, Rows, Tensor]] = []
        for assignment, name, weight in self.layers:
            grad, row_map = weight.grad, maps.get(name)
            if grad is None or row_map is None or grad.is_sparse or conditioned.holds(name, grad):
                return False
            rows = assignment.rows_of_gradient(row_map)
            if (found := row_map.screen(rows)) is None:
                self.possible = False
                return False
            work.append((name, grad, row_map, rows, found))
        looked_at = [found for *_, found in work] + [bias.grad for bias in self.others if bias.grad is not None]
        if not passes(looked_at, check):
            return False
        for _, _, row_map, rows, found in reversed(work):  # the last ones are still in the cache
            row_map.apply_(rows, found)
        for name, grad, *_ in work:  # once all are replaced: views of one buffer have one version
            conditioned.note(name, grad)
        return True
