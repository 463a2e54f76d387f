"""Empirical and Monte-Carlo Fisher matrices, known by their products."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradcond.curvature.gauss_newton import Bend, GaussNewtonOperator
from gradcond.curvature.likelihoods import LIKELIHOODS
from gradcond.curvature.loss_operator import Evaluation


class EmpiricalFisher(GaussNewtonOperator):
    """The mean over data of g_n g_n^T, with g_n the gradient of the loss of datum n at its own target.

        E = sum_n w_n g_n g_n^T / sum_n w_n,   loss = sum_n w_n loss_n / sum_n w_n   (without / for a sum)

    A datum is what the loss has a class target for (a token, a pixel), and otherwise a row of the batch; w_n are
    the class weights, zero where ignored. Symmetric, positive semi-definite, of rank at most the number of data.
    E v is J^T (w J v) with J the Jacobian of the losses: two passes, the g_n are never written out. Other losses
    than torch's return ``(numerators, denominators)``, both (N,), one entry w_n loss_n and w_n a datum. Everything
    else, the arguments included, is as in :class:`Hessian`.

    References:
        F. Kunstner, L. Balles, P. Hennig, Limitations of the empirical Fisher approximation for natural gradient
        descent, 2019.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> EmpiricalFisher(model, torch.nn.MSELoss(), data).to_dense()  # gradients (2, 0) and (0, 8)
        tensor([[ 2.,  0.],
                [ 0., 32.]])
    """

    def _tops(self, output: Any, batch: Any, evaluation: Evaluation) -> tuple[list[Tensor], Bend]:
        terms, weights, evaluation.share = self.objective.terms(output, batch)
        inverse = torch.where(weights > 0, 1 / weights, 0.0).to(terms.dtype).detach()
        return [terms], lambda parts, batched: [inverse * part for part in parts]


class MonteCarloFisher(GaussNewtonOperator):
    """The Fisher information with targets drawn from the model's own predictions; its mean is the GGN.

    The loss is read as a negative log-likelihood: cross-entropy as that of a class, binary cross-entropy with
    logits as that of independent bits, squared error as that of a Gaussian of unit variance for (1/2) |z - y|^2
    (torch's, which has no 1/2 and a mean over outputs, of variance half the number averaged). Each datum of the
    empirical Fisher gets mc_samples targets and keeps its weight. Symmetric and positive semi-definite. Every
    product uses the same samples; they follow the seed and the order of the data, not the batches, nor how many
    processes have them: the data of several follow each other as their ranks do. How many targets each has is
    exchanged in the first pass, and again in any pass that finds another number; that pass is then taken twice.
    Everything else, the other arguments included, is as in :class:`Hessian`.

    Args:
        mc_samples: targets drawn for each datum; the standard error falls as its square root.
        seed: of the samples, any integer; the same on every process, as mc_samples is.

    Raises:
        TypeError: targets that are no tensors, or a seed that is no integer.
        ValueError: a loss that is none of the three; targets of fewer or more entries than the outputs; of
            several processes, one whose number of targets changes from pass to pass.

    References:
        J. Martens, New insights and perspectives on the natural gradient method, 2020, section 5.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))]
        >>> F = MonteCarloFisher(model, torch.nn.MSELoss(), data, mc_samples=100_000)
        >>> F.to_dense().round(decimals=1)  # of GGN, diag(1, 4)
        tensor([[1., 0.],
                [0., 4.]])
    """

    _needs_output = True

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        data: Iterable[Any],
        *,
        mc_samples: int = 1,
        seed: int = 0,
        weight_fn: Callable[[Any], Any] | None = None,
        method: str = "auto",
        chunk: int | None = None,
        process_group: Any = None,
    ) -> None:
        options: Any = {"method": method, "chunk": chunk, "process_group": process_group}
        super().__init__(model, loss_fn, data, weight_fn=weight_fn, **options)
        self.mc_samples, self.seed = mc_samples, operator.index(seed)
        if mc_samples < 1:
            raise ValueError(f"expected mc_samples >= 1, got {mc_samples}")
        loss = self.objective.torch_loss
        if loss is None or loss.name not in LIKELIHOODS:
            raise ValueError(
                f"expected a loss that is a likelihood ({', '.join(LIKELIHOODS)}; module or function), "
                f"got {self.loss_fn}; GGN takes any loss"
            )
        self._counts: list[int] = []  # how many numbers each process draws in a pass
        self._count = 0  # and this one, so far in this pass

    def _settings(self) -> tuple[int, ...]:
        return self.mc_samples, self.seed, self._before

    def _same(self) -> dict[str, Any]:
        return {**super()._same(), "mc_samples and seed": (self.mc_samples, self.seed)}

    @property
    def _before(self) -> int:
        """Where the numbers of this process begin: after those of the lower ranks."""
        return sum(self._counts[: self.processes.rank])

    def _mean(self, *args: Any) -> Tensor:
        for _ in range(2):
            self._moved = False
            mean = super()._mean(*args)
            if not self._moved:
                return mean
            self._counts = self.processes.gather(self._count)
        raise ValueError(
            "expected the same data in every pass, got another number of targets in each of two passes in a row"
        )

    def _add_up(self, total: Tensor, numbers: list[Any], error: Exception | None) -> tuple[Tensor, list[Any]]:
        # does any process draw more or fewer numbers than the others think?
        rank = self.processes.rank
        moved = self._counts[rank : rank + 1] != [self._count]
        total, (*numbers, moved) = super()._add_up(total, [*numbers, moved], error)
        self._moved = bool(moved)
        return total, numbers

    def _evaluations(self, drawn: Iterator[Any]) -> Iterator[Evaluation]:
        self._count = 0
        return super()._evaluations(drawn)

    def _evaluation(self, batch: Any, *parameters: Any) -> Evaluation:
        evaluation = super()._evaluation(batch, *parameters)
        evaluation.start = self._before + self._count
        self._count += self.mc_samples * self._numbers(batch)
        return evaluation

    def _numbers(self, batch: Any) -> int:
        """How many a sample of every target takes: one for a class, one for every entry of other targets."""
        loss, target = self.objective.torch_loss, self.objective.target(batch)
        assert loss is not None
        if not isinstance(target, Tensor):
            raise TypeError(f"expected a tensor as target, got {type(target).__name__}: see target= of ModelLoss")
        if loss.name == "cross_entropy" and not loss.has_class_targets(target):
            target = target.select(min(target.ndim - 1, 1), 0)  # one class of all
        return target.numel()

    def _tops(self, output: Any, batch: Any, evaluation: Evaluation) -> tuple[list[Tensor], Bend]:
        loss, target = self.objective.torch_loss, self.objective.target(batch)
        assert loss is not None

        def uniform(rows: int, numbers: int) -> Tensor:
            if rows * numbers != self._numbers(batch):
                shapes = tuple(output.shape), tuple(target.shape)
                raise ValueError(f"expected targets of the shape of the outputs, {shapes[0]}, got {shapes[1]}")
            # drawn once a batch however often it is evaluated, on the CPU: the same on every device
            if evaluation.noise is None:
                shape = (rows, self.mc_samples, numbers)
                evaluation.noise = _uniforms(self.seed, evaluation.start, shape)
            return evaluation.noise.to(output.device)

        _, evaluation.share = self.objective.of(output, batch)
        top = LIKELIHOODS[loss.name](output, target, loss, uniform)
        scale = self.objective.scale(output, batch) / self.mc_samples
        return [top], lambda parts, batched: [scale * part for part in parts]


def _uniforms(seed: int, start: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [0, 1): those of a seed form one sequence, here from ``start`` on."""
    skipped = start % 4  # Philox makes four at a time
    philox = np.random.Philox(key=seed % 2**128).advance(start // 4)
    return torch.from_numpy(np.random.Generator(philox).random(skipped + math.prod(shape))[skipped:]).view(shape)
