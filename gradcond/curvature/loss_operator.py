"""What the curvature operators of a model share: one pass over the data, weighted and isolated."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from gradcond.curvature.losses import Mean
from gradcond.curvature.operators import ASYMMETRY, Operator, generator_from, working_dtype
from gradcond.curvature.passes import batches, forward, left_as_found, unwrap

Term = Callable[[Any, Callable[[Any], Tensor]], Tensor]  # (output, loss of an output) -> what to add up


class LossOperator(Operator):
    """A matrix over the trainable parameters that is a mean over batches; subclasses define ``_term``."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        data: Iterable[Any],
        *,
        weight_fn: Callable[[Any], Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
        self.model, self.loss_fn, self.weight_fn = unwrap(model), loss_fn, weight_fn
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("expected a model with trainable parameters, but none requires grad")
        self.data: Iterable[Any] = list(data) if isinstance(data, Iterator) else data
        if isinstance(data, Sized) and len(data) == 0:
            raise ValueError("expected at least one batch, got an empty data set")
        dtype = self.parameters[0].dtype
        for p in self.parameters:
            dtype = torch.promote_types(dtype, p.dtype)
        if dtype not in ASYMMETRY:
            raise ValueError(f"expected real floating-point parameters, got {dtype}")
        super().__init__(sum(p.numel() for p in self.parameters), dtype, self.parameters[0].device)
        self._noise: float | None = None
        self._seed = 0

    def loss(self) -> Tensor:
        """The loss on all batches concatenated, a scalar."""
        return self._mean(lambda output, loss: loss(output).detach())

    def gradient(self) -> Tensor:
        """Its gradient (n,), in the working dtype."""
        return self._mean(lambda output, loss: self._flat(grad([loss(output)], self.parameters)))

    def check_deterministic(self) -> float:
        """The relative difference of two products of the same vector, under different random states.

        Costs two products, once per operator: eigsh, spectral_density, condition_number, trace and diagonal
        call it before they start. ``num_matvecs`` of the operator counts them, that of the results does not.

        Raises:
            ValueError: the products differ by more than rounding explains.
        """
        if self._noise is None:
            v = torch.randn(self.shape[0], generator=generator_from(0), dtype=torch.float64)
            v = v.to(self.device, working_dtype(self.dtype))
            first = self @ v
            self._seed = 1
            try:
                second = self @ v
            finally:
                self._seed = 0
            noise = float((first - second).norm() / first.norm().clamp_min(torch.finfo(v.dtype).tiny))
            if noise > ASYMMETRY[self.dtype]:
                raise ValueError(
                    f"two products of the same vector differ by {noise:.1e} of their size; {self._culprit()}"
                )
            self._noise = noise
        return self._noise

    def _culprit(self) -> str:
        training = [(name, type(m).__name__) for name, m in self.model.named_modules() if m.training]
        random = [name for name, kind in training if "Dropout" in kind]
        norms = [name for name, kind in training if "Norm" in kind]
        if random:
            return f"dropout is active in {random[0]!r}: call model.eval() first"
        if norms:
            return f"{norms[0]!r} normalizes by batches that change: do not shuffle, or call model.eval()"
        return "something random remains: augmentation, a sampler, or functional dropout"

    def _columns(self, V: Tensor) -> Tensor:
        return self._mean(lambda output, loss: self._term(output, loss, V))

    @abstractmethod
    def _term(self, output: Any, loss: Callable[[Any], Tensor], V: Tensor) -> Tensor: ...

    def _mean(self, term: Term) -> Tensor:
        """The term summed over the batches and divided by the weight of all."""
        mean, total = Mean(self.loss_fn, self.weight_fn), torch.zeros((), device=self.device)
        with left_as_found(self.model, self.data, self._seed):
            for batch in batches(self.data, self.device):
                weight = self.weight_fn(batch) if self.weight_fn else None
                if weight is None or float(weight) != 0:
                    loss = functools.partial(mean.numerator, batch=batch, weight=weight)
                    total = total + term(forward(self.model, batch[0]), loss)
        return total / mean.divisor()

    def _split(self, v: Tensor) -> list[Tensor]:
        parts = v.split([p.numel() for p in self.parameters])
        return [part.view_as(p).to(p.dtype) for part, p in zip(parts, self.parameters, strict=True)]

    def _flat(self, parts: Sequence[Tensor]) -> Tensor:
        dtype = working_dtype(self.dtype)
        return torch.cat([part.detach().reshape(-1).to(self.device, dtype) for part in parts])


def grad(
    ys: Sequence[Tensor], xs: Sequence[Tensor], vs: Sequence[Tensor] | None = None, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Vector-Jacobian product, zeros where x does not enter y; the graph of y is kept."""
    if not any(y.requires_grad for y in ys):
        raise ValueError("expected a loss that depends on the trainable parameters; is it detached?")
    return torch.autograd.grad(ys, xs, vs, retain_graph=True, create_graph=create_graph, materialize_grads=True)
