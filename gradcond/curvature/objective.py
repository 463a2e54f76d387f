"""What a loss is: a function of output and target, or of model and batch; and how its batches add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from gradcond.curvature.losses import torch_loss


@dataclass(frozen=True)
class ModelLoss:
    """Marks a loss that calls the model itself: ``loss_fn(model, batch)`` on batches of any form.

    For models that return their own loss, batches that are not pairs, and losses with derivatives of the
    network inside (``torch.autograd.grad(..., create_graph=True)``). The type, rather than an option of each
    operator, so that it goes wherever a loss goes: into a problem file, say. Also a decorator.

    ``loss_fn(model, batch)`` returns a scalar, something with a scalar ``.loss`` or ``["loss"]``, or a pair
    (numerator, denominator). Where ``output`` is given the loss is taken in two steps,
    ``loss_fn(output(model, batch), target(batch))``: GGN and Monte-Carlo Fisher need that cut, and torch's own
    losses are then weighted exactly.

    Args:
        loss_fn: as above.
        output: ``output(model, batch)``, the model's prediction: a tensor, or a nest of them.
        target: ``target(batch)``; the batch itself by default.

    Example:
        >>> from gradcond.curvature import Hessian
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [{"x": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}]
        >>> H = Hessian(model, ModelLoss(lambda model, batch: model(batch["x"]).square().mean()), data)
        >>> H @ torch.tensor([1.0, 1.0])
        tensor([1., 4.])
    """

    loss_fn: Callable[..., Any]
    output: Callable[[nn.Module, Any], Any] | None = None
    target: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if self.target is not None and self.output is None:
            raise ValueError("expected output=, the model's prediction, beside target=")

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """The loss of one batch, as loss_fn returns it."""
        if self.output is None:
            return self.loss_fn(model, batch)
        target = batch if self.target is None else self.target(batch)
        return self.loss_fn(self.output(model, batch), target)


@dataclass(frozen=True)
class Share:
    """What a batch adds to the mean, besides derivatives."""

    value: Tensor  # its numerator, a scalar
    weight: Any  # its denominator; None for a sum
    kind: Any = None  # of a batch whose weighting is unknown: only batches of one kind weigh the same


class Objective:
    """A loss in its two steps, and each batch's share in the mean of all."""

    def __init__(self, loss_fn: Callable[..., Any], weight_fn: Callable[[Any], Any] | None) -> None:
        self.takes_pairs = not isinstance(loss_fn, ModelLoss)
        self.loss = loss_fn if isinstance(loss_fn, ModelLoss) else ModelLoss(loss_fn, _of_input, _second)
        if isinstance(function := self.loss.loss_fn, type) or not callable(function):
            raise TypeError(
                f"expected a loss, loss_fn(output, target) or a ModelLoss, got {function!r:.80}; of a class make "
                "an object, such as CrossEntropyLoss()"
            )
        self.weight_fn = weight_fn
        self.torch_loss = torch_loss(self.loss.loss_fn) if self.loss.output else None

    @property
    def modules(self) -> list[nn.Module]:
        """The loss, where it is a module that may write to its buffers, as torch's do not."""
        loss_fn = self.loss.loss_fn
        return [loss_fn] if self.torch_loss is None and isinstance(loss_fn, nn.Module) else []

    def require_output(self, kind: str) -> None:
        """Raise unless loss and model can be separated."""
        if self.loss.output is None:
            raise ValueError(
                f"{kind} needs the loss as a function of the model's output: "
                "ModelLoss(loss_fn, output=lambda model, batch: ..., target=lambda batch: ...), so that the "
                "loss is loss_fn(output(model, batch), target(batch))"
            )

    def output(self, model: nn.Module, batch: Any) -> Any:
        """The model's prediction; where loss and model are not separable, the loss."""
        return self.loss.output(model, batch) if self.loss.output else self.loss.loss_fn(model, batch)

    def target(self, batch: Any) -> Any:
        """What the loss compares the prediction with."""
        return self.loss.target(batch) if self.loss.target else batch

    def weight(self, batch: Any) -> Any:
        """What weight_fn says, None without one."""
        return None if self.weight_fn is None else self.weight_fn(batch)

    def of(self, output: Any, batch: Any) -> tuple[Tensor, Share]:
        """The numerator of a batch, the scalar to differentiate, and its share in the mean."""
        weight, kind = self.weight(batch), None
        if self.torch_loss is not None and weight is None:
            value, denominator = self.torch_loss.parts(output, self.target(batch))
        else:
            value, denominator = _pair(self._result(output, batch))
            if denominator is None and weight is None:
                denominator, kind = 1, (_rows(batch), *_kinds(self.target(batch)))
            elif denominator is None:
                value, denominator = _scalar(value) * weight, weight
            elif isinstance(value, Tensor) and value.shape == getattr(denominator, "shape", None):
                value, denominator = value.sum(), denominator.sum(dtype=torch.float64)  # one entry a datum
        value = _scalar(value)
        if denominator is not None and not _is_number(denominator):
            raise ValueError(
                "expected (numerator, denominator) with a denominator that is one number, constant in the "
                f"parameters, got {_shown(denominator)}; sum and detach it, or return the loss alone"
            )
        return value, Share(value.detach(), denominator, kind)

    def scale(self, output: Any, batch: Any) -> Any:
        """What weight_fn multiplies the numerator of one of torch's losses by."""
        weight = self.weight(batch)
        if weight is None or self.torch_loss is None:
            return 1.0
        denominator = self.torch_loss.parts(output, self.target(batch))[1]
        return weight if denominator is None else weight / denominator

    def terms(self, output: Any, batch: Any) -> tuple[Tensor, Tensor, Share]:
        """The loss of each datum and its weight, both (N,), and the share of the batch."""
        weight = self.weight(batch)
        if self.torch_loss is not None:
            terms, weights = self.torch_loss.terms(output, self.target(batch))
            scale = self.scale(output, batch)
            _, share = self.of(output, batch)
            return terms * scale, weights * scale, share
        terms, denominators = _pair(self._result(output, batch))
        shape = getattr(terms, "shape", ())
        if len(shape) != 1 or getattr(denominators, "shape", None) != shape or weight is not None:
            raise ValueError(
                "expected a loss of known terms: take one of torch's losses (with ModelLoss(..., output=)), or let "
                "loss_fn return (numerators, denominators), both (N,), one entry a datum, without weight_fn"
            )
        return terms, denominators, Share(terms.detach().sum(), denominators.sum(dtype=torch.float64))

    def _result(self, output: Any, batch: Any) -> Any:
        return self.loss.loss_fn(output, self.target(batch)) if self.loss.output else output


def _of_input(model: nn.Module, pair: Any) -> Any:
    return model(**pair[0]) if isinstance(pair[0], Mapping) else model(pair[0])


def _second(pair: Any) -> Any:
    return pair[1]


def _pair(result: Any) -> tuple[Any, Any]:
    """(numerator, denominator or None) of what a loss returned."""
    if isinstance(result, Mapping) and "loss" in result:
        return result["loss"], None
    if not isinstance(result, Tensor) and hasattr(result, "loss"):
        return result.loss, None
    return result if isinstance(result, tuple) and len(result) == 2 else (result, None)


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(
            f"expected loss_fn to return a scalar tensor, got {_shown(value)}; reduce by mean or sum, or return a "
            "pair (numerator, denominator)"
        )
    return value.reshape(())


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.requires_grad
    return isinstance(value, Real)


def _shown(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _rows(batch: Any) -> int | None:
    """Number of samples in a batch: the length of its first tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((rows for rows in map(_rows, parts) if rows is not None), None)


def _kinds(part: Any, key: str = "") -> Iterator[Any]:
    """What batches of equal weight have in common: shapes, and how many entries are masked or ignored."""
    if isinstance(part, Tensor):
        counted = None
        if part.dtype == torch.bool or "mask" in key:
            counted = int(part.count_nonzero())
        elif not part.is_floating_point() and not part.is_complex():
            counted = int((part != -100).sum())  # torch's mark of what is ignored
        yield tuple(part.shape), counted
    elif isinstance(part, Mapping):
        for name, value in part.items():
            yield from _kinds(value, str(name))
    elif isinstance(part, list | tuple):
        for value in part:
            yield from _kinds(value, key)


class Mean:
    """Adds up the shares of batches: what to divide the sum of their derivatives by."""

    def __init__(self, *shares: Share) -> None:
        self.shares = list(shares)

    def check(self) -> None:
        """Raise when a loss is not finite, or when batches of unknown weight differ."""
        values = [share.value for share in self.shares]
        if not math.isfinite(sum(values)):  # one look at the device; a sum may overflow where no value does
            for index, value in enumerate(map(float, values)):
                if not math.isfinite(value):
                    raise ValueError(f"expected a finite loss, got {value} on batch {index}")
        require_one_kind(self.kinds)

    @property
    def kinds(self) -> set[Any]:
        """Of the batches whose weighting is unknown."""
        return {share.kind for share in self.shares if share.kind is not None}

    @property
    def sums(self) -> list[Any]:
        """The total weight, and of how many batches; then how many batches are sums, without a weight."""
        weights = [share.weight for share in self.shares if share.weight is not None]
        # in double precision: in half, a sum stands still where it is 256 times what is added
        weights = [weight.double() if isinstance(weight, Tensor) else weight for weight in weights]
        return [sum(weights), len(weights), len(self.shares) - len(weights)]


def divisor(weight: Any, weighted: float, unweighted: float) -> Any:
    """What the sum over the batches is divided by, from Mean.sums of all of them."""
    if not weighted and not unweighted:
        raise ValueError("expected at least one batch that counts, got an empty data set")
    if weighted and unweighted:
        raise ValueError("expected the mean of all batches or the sum of all, got means and sums: take one loss_fn")
    if not weighted:
        return 1.0
    if not float(weight) > 0:
        raise ValueError(f"expected a positive total weight, got {float(weight)}; are all ignored?")
    return weight


def require_one_kind(kinds: set[Any]) -> None:
    """Raise when batches of unknown weight differ in what a mean could depend on."""
    if len(kinds) > 1:
        raise ValueError(
            "a loss of unknown weighting on uneven batches (samples, then shapes and what is not masked): "
            f"{', '.join(map(str, sorted(kinds, key=str)[:2]))}; return (numerator, denominator) from loss_fn, "
            "or pass weight_fn=lambda batch: len(batch[1])"
        )
