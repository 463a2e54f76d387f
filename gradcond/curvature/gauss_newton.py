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
from gradcond.curvature.memory import SHARE, available
from gradcond.curvature.objective import Mean, divisor
from gradcond.curvature.operators import working_dtype, written_out
from gradcond.curvature.passes import tensors_in
from gradcond.curvature.products import Parts, Product, duals, grad, primal_and_tangent, roots, warm_forward_mode
from gradcond.curvature.root import Root, root_of
from gradcond.curvature.vectors import parts_of

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

    def root(self, most: int, progress: Callable[[int], Any] | None = None) -> Root | None:
        """R with R^T diag(signs) R equal to the matrix: B = C diag(signs) C^T of every batch gives rows C^T J.

        Each row takes one backward pass, about half a product. None where J has more than ``most`` rows, or where
        they do not fit into memory, and of several processes.
        """
        if self.processes.several or self.made_by is not None:
            return None
        size, mean = 0, Mean()
        with self._drawn(self._seed) as drawn:
            for evaluation in self._evaluations(drawn):
                size += sum(z.numel() for z in self._evaluate(evaluation)[0])
                if size > most or not self._fit(size):
                    return None
                assert evaluation.share is not None
                mean.shares.append(evaluation.share)
        mean.check()
        scale = float(divisor(*mean.sums)) ** 0.5
        rows = torch.empty(size, self.shape[0], dtype=working_dtype(self.dtype), device=self.device)
        signs = [torch.empty(0, dtype=torch.float64, device="cpu")]
        eps, left = torch.finfo(self.precision).eps, enumerate(rows)
        with self._drawn(self._seed) as drawn:
            for evaluation in self._evaluations(drawn):
                tops, bend = self._evaluate(evaluation)
                if not any(z.numel() for z in tops):
                    continue
                columns, own = root_of(_bent(tops, bend), eps)
                signs.append(own.cpu())
                for column, (i, row) in zip(columns.mT, left, strict=False):
                    slopes = grad(tops, evaluation.parameters, parts_of(column, tops))
                    torch.cat([g.flatten().to(rows) for g in slopes], out=row)
                    if i % 2 == 0 and progress is not None:
                        progress(1)
        found = torch.cat(signs)
        self.num_matvecs += (len(found) + 1) // 2
        return Root(rows[: len(found)].div_(scale), found)

    def _fit(self, size: int) -> bool:
        """Whether there is memory for so many rows, and for the products with them."""
        free = available(self.device)
        needed = 2 * size * self.shape[0] * working_dtype(self.dtype).itemsize
        return free is None or needed < SHARE * free


def _bent(tops: Sequence[Tensor], bend: Bend) -> Tensor:
    """B (m, m), in float64."""

    def product(column: Tensor) -> Tensor:
        bent = bend(parts_of(column[:, 0], tops), False)
        return torch.cat([part.detach().flatten() for part in bent])[:, None]

    return written_out(product, sum(z.numel() for z in tops), torch.float64, tops[0].device, 1)


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
