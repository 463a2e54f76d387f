"""Matrices J^T B J: J the Jacobian of what a model computes, B a small matrix for each batch."""

from __future__ import annotations

import functools
import itertools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradcond.curvature.loss_operator import Evaluation, LossOperator
from gradcond.curvature.passes import tensors_in
from gradcond.curvature.products import Parts, Product, duals, grad, primal_and_tangent, roots, warm_forward_mode

Tops = Callable[[nn.Module, Any], list[Tensor]]
Bend = Callable[[Parts, bool], Parts]  # the product with B


class GaussNewtonOperator(LossOperator):
    """J^T B J on all batches concatenated; subclasses say what J is of, and what B is, in ``_tops``."""

    @abstractmethod
    def _tops(self, output: Any, batch: Any, evaluation: Evaluation) -> tuple[list[Tensor], Bend]:
        """The tensors whose Jacobian is J, and the product with B."""

    def _tops_alone(self, evaluation: Evaluation) -> Tops:
        """These tensors, or all that they are taken from."""
        return lambda model, batch: self._tops(self.objective.output(model, batch), batch, evaluation)[0]

    def _evaluate(self, evaluation: Evaluation) -> tuple[list[Tensor], Bend]:
        def function(model: nn.Module, batch: Any) -> tuple[list[Tensor], Bend]:
            return self._tops(self.objective.output(model, batch), batch, evaluation)

        result: tuple[list[Tensor], Bend] = evaluation(function)
        return result

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
                of_name = {names[i]: part for i, part in moved.items()}
                pushed = along(evaluation, outputs(evaluation), names, of_name, batched)
                pushed = list(itertools.compress(pushed, evaluation.moving or ()))
            else:
                above, free = [slopes[i] for i in moved], evaluation.frees
                pushed = grad(above, dummies, list(moved.values()), batched=batched, free=free)
            below = [parameters[i] for i in own]
            return grad(tops, below, bend(pushed, batched), batched=batched, free=evaluation.frees)

        return product

    def _forward_over_reverse(self, evaluation: Evaluation) -> Product:
        evaluation.once = False  # two passes hold half of what a single one of forward mode with a graph does

        def product(parts: Parts, batched: bool, forward: bool = False) -> Parts:
            of_name = dict(zip(self.names, parts, strict=True))
            pushed = along(evaluation, self._tops_alone(evaluation), self.names, of_name, batched)
            tops, bend = self._evaluate(evaluation)
            if evaluation.moving is not None:
                pushed = list(itertools.compress(pushed, evaluation.moving))
            return grad(tops, evaluation.parameters, bend(pushed, batched), batched=batched, free=True)

        return product


def outputs(evaluation: Evaluation) -> Tops:
    """All tensors of the output."""
    return lambda model, batch: tensors_in(evaluation.objective.output(model, batch))


def along(
    evaluation: Evaluation, tops: Tops, names: Sequence[str], parts: Mapping[str, Tensor], batched: bool
) -> list[Tensor]:
    """J v by forward mode, without a graph; of stacked vectors in one pass."""
    primals = {name: p.detach() for name, p in zip(names, evaluation.parameters, strict=True) if name in parts}
    with torch.no_grad():
        if not batched:
            with duals(primals, list(parts.values())) as moved:
                return [primal_and_tangent(z)[1] for z in evaluation(tops, moved)]
        warm_forward_mode()
        function = functools.partial(evaluation, tops)
        return list(torch.vmap(lambda own: torch.func.jvp(function, (primals,), (own,))[1])(parts))
