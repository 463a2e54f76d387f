"""A step of a short chain on Linear layers, all of them at one go, with next to no Python between the operations.

The engine goes from layer to layer, whatever they are, and asks each one what there is to do. Of small layers that
takes longer than the arithmetic. Where a chain is one conditioner that can change all gradients together, alone or
before one that scales their rows, and every layer is a Linear with its bias, an ordinary step is taken here, by the
same operations; whenever anything is out of the ordinary nothing is touched, and the engine takes the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gradcond.assignment import Assignment, Conditioned
from gradcond.capture import InputCapture
from gradcond.conditioner import Conditioner, Squares
from gradcond.finite import passes

__all__ = ["Together"]


class Together:
    """The layers of a step, and what they need.

    Args:
        chain: of the optimizer.
        assignments: its layers.
        captures: of all layers of the model, by name.
    """

    def __init__(
        self, chain: Sequence[Conditioner], assignments: Sequence[Assignment], captures: Mapping[str, InputCapture]
    ) -> None:
        able = [c for c in chain[:1] if type(c).condition_all_ is not Conditioner.condition_all_]
        able += [c for c in chain[1:2] if type(c).scale_all is not Conditioner.scale_all]
        members, alike = tuple(range(len(chain))), len(assignments) == len(captures) > 0
        self.possible = alike and able == chain and all(_is_linear(a) and a.members == members for a in assignments)
        self.rows = [
            (a.layer.name, (a.weights[0], a.biases[0]), captures[a.layer.name])
            for a in assignments
            if self.possible  # otherwise nobody asks
        ]

    def step_(
        self,
        chain: Sequence[Conditioner],
        states: Sequence[Mapping[str, dict[str, Any]]],
        scratch: Sequence[dict[str, Any]],
        conditioned: Conditioned,
        check: bool | None,
        rate: Any,
    ) -> bool:
        """Folds the moments and replaces the gradients; says whether it did, and has touched nothing if not.

        Args:
            chain: of the optimizer.
            states: of each conditioner, by layer.
            scratch: what each conditioner keeps between the steps.
            conditioned: takes down which gradients have been replaced, and in which version.
            check: are gradients and inputs looked at? None: on the CPU.
            rate: the size of the optimizer's step, where it is the same for all layers.
        """
        if len(chain) > 1 and not isinstance(rate, float):
            return False
        gradients: list[tuple[Tensor, Tensor]] = []
        own, moments = [], []
        for name, (weight, bias), capture in self.rows:
            g, h, state, seen = weight.grad, bias.grad, states[0].get(name), capture.ready()
            if g is None or h is None or seen is None or g.is_sparse or not (state and state.get("has_bias")):
                return False
            gradients.append((g, h))
            own.append(state)
            moments.append(seen)
        looked_at = [g for pair in gradients for g in pair] + [m.variance for m in moments]
        if not passes(looked_at, check):
            return False
        squares: list[Squares] | None = [] if len(chain) > 1 else None
        parameters = [pair for _, pair, _ in self.rows]
        if not chain[0].condition_all_(parameters, gradients, own, moments, scratch[0], squares):
            return False
        if squares:
            scaled = [states[1][name] for name, _, _ in self.rows]
            factors = chain[1].scale_all(squares, scaled, rate, scratch[1])
            for (g, h), factor in zip(gradients, factors, strict=True):
                g.mul_(factor.mT)
                h.mul_(factor[0])
        for (name, _, capture), (g, _) in zip(self.rows, gradients, strict=True):
            capture.start()
            conditioned.note(name, g)
        return True


def _is_linear(assignment: Assignment) -> bool:
    return assignment.matrix and assignment.moves_bias and len(assignment.biases) == 1
