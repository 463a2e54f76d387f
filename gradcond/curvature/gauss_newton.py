"""Matrices J^T B J: J the Jacobian of what a model computes, B a small matrix for each batch."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradcond.curvature.loss_operator import Evaluation, LossOperator
from gradcond.curvature.passes import tensors_in
from gradcond.curvature.products import Parts, Product, duals, grad, primal_and_tangent, roots, warm_forward_mode

Bend = Callable[[Parts, bool], Parts]  # the product with B


class GaussNewtonOperator(LossOperator):
    """J^T B J on all batches concatenated; subclasses say what J is of, and what B is, in ``_tops``."""

    @abstractmethod
    def _tops(self, output: Any, batch: Any, evaluation: Evaluation) -> tuple[list[Tensor], Bend]:
        """The tensors whose Jacobian is J, and the product with B."""

    def _evaluate(self, evaluation: Evaluation, parameters: dict[str, Tensor] | None = None) -> tuple[Any, Any]:
        def function(model: nn.Module, batch: Any) -> tuple[list[Tensor], Bend]:
            return self._tops(self.objective.output(model, batch), batch, evaluation)

        return evaluation(function, parameters)

    def _double_backward(self, evaluation: Evaluation) -> Product:
        names, parameters = self.names, evaluation.parameters
        tops, bend = self._evaluate(evaluation)
        # J^T u is linear in u: its derivative along v is J v
        dummies = [torch.zeros_like(z, requires_grad=True) for z in tops]
        pulled = grad(tops, parameters, dummies, create_graph=True)
        self._look_through(pulled)
        linear = [i for i, g in enumerate(pulled) if g.requires_grad]
        slopes = dict(zip(linear, roots([pulled[i] for i in linear]), strict=True))
        del pulled

        def product(
            parts: Parts, batched: bool, places: Sequence[int] | None = None, forward: bool = False
        ) -> Parts:
            own = range(len(parameters)) if places is None else places
            moved = {i: part for i, part in zip(own, parts, strict=True) if i in slopes}
            if not moved:
                return [torch.zeros_like(part) for part in parts]
            pushed: Parts
            if forward:
                pushed = outputs_along(evaluation, names, {names[i]: part for i, part in moved.items()})
            else:
                above, free = [slopes[i] for i in moved], evaluation.frees
                pushed = grad(above, dummies, list(moved.values()), batched=batched, free=free)
            below = [parameters[i] for i in own]
            return grad(tops, below, bend(pushed, batched), batched=batched, free=evaluation.frees)

        return product

    def _forward_over_reverse(self, evaluation: Evaluation) -> Product:
        names, parameters = self.names, evaluation.parameters
        of_name = dict(zip(names, parameters, strict=True))

        def product(parts: Parts, batched: bool, forward: bool = False) -> Parts:
            if forward:
                tops, bend = self._evaluate(evaluation)
                pushed = outputs_along(evaluation, names, dict(zip(names, parts, strict=True)))
            else:
                with duals(of_name, parts) as moved:
                    tops, bend = self._evaluate(evaluation, moved)
                    both = [primal_and_tangent(z) for z in tops]
                tops, pushed = [primal for primal, _ in both], [tangent.detach() for _, tangent in both]
            return grad(tops, parameters, bend(pushed, batched), batched=batched, free=True)

        return product


def outputs_along(evaluation: Evaluation, names: Sequence[str], parts: Mapping[str, Tensor]) -> list[Tensor]:
    """J V of the outputs that move, by forward mode: for stacked vectors, in one pass without a graph."""
    primals = {name: p.detach() for name, p in zip(names, evaluation.parameters, strict=True) if name in parts}

    def outputs(moved: dict[str, Tensor]) -> list[Tensor]:
        output = evaluation(evaluation.objective.output, moved)
        return list(itertools.compress(tensors_in(output), evaluation.moving))

    warm_forward_mode()
    with torch.no_grad():
        return list(torch.vmap(lambda own: torch.func.jvp(outputs, (primals,), (own,))[1])(parts))
