"""How the losses of batches add up to the loss of all batches concatenated."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# what a batch contributes: a scalar numerator and its denominator; the whole loss is sum / sum,
# or just the sum where the denominator is None
Parts = tuple[Tensor, Any]


def split_loss(loss_fn: Callable[..., Any]) -> Callable[[Any, Any], Parts] | None:
    """The (numerator, denominator) of one of torch's own losses, or None when its weighting is unknown."""
    options = _torch_options(loss_fn)
    if options is None or options["reduction"] == "none":
        return None
    if options["reduction"] == "sum":
        return lambda output, target: (loss_fn(output, target), None)
    return lambda output, target: _mean_parts(options, output, target)


def _torch_options(loss_fn: Callable[..., Any]) -> dict[str, Any] | None:
    """Every option of one of torch's losses, its function form as ``function``; None for anything else."""
    if type(loss_fn).__module__ == "torch.nn.modules.loss":  # exact: a subclass may compute anything
        names = ("weight", "ignore_index", "reduction")
        options = {name: getattr(loss_fn, name, None) for name in names}
        return {**options, "unreduced": _without_reduction(loss_fn), "name": type(loss_fn).__name__}
    function = loss_fn.func if isinstance(loss_fn, functools.partial) else loss_fn
    given = loss_fn.keywords if isinstance(loss_fn, functools.partial) else {}
    name = getattr(function, "__name__", "")
    positional = isinstance(loss_fn, functools.partial) and loss_fn.args
    if getattr(F, name, None) is not function or positional or {"size_average", "reduce"} & given.keys():
        return None
    parameters = inspect.signature(function).parameters
    if "reduction" not in parameters or (name not in _CLASS_INDEX and given.get("weight") is not None):
        return None
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    unreduced = functools.partial(function, **{**given, "reduction": "none"})
    return {"weight": None, "ignore_index": None, **defaults, **given, "unreduced": unreduced, "name": name}


def _without_reduction(loss_fn: Any) -> Callable[..., Tensor]:
    def unreduced(output: Tensor, target: Tensor) -> Tensor:
        reduction, loss_fn.reduction = loss_fn.reduction, "none"
        try:
            return loss_fn(output, target)
        finally:
            loss_fn.reduction = reduction

    return unreduced


_CLASS_INDEX = {"cross_entropy", "nll_loss", "CrossEntropyLoss", "NLLLoss", "NLLLoss2d"}


def _mean_parts(options: dict[str, Any], output: Tensor, target: Tensor) -> Parts:
    losses = options["unreduced"](output, target)
    if options["name"] in _CLASS_INDEX and not target.is_floating_point():
        # torch divides by the weights of the classes that are not ignored, label smoothing or not
        counted = target[target != options["ignore_index"]]
        weight = options["weight"]
        return losses.sum(), counted.numel() if weight is None else weight[counted].sum()
    if options["reduction"] == "batchmean":
        return losses.sum(), output.shape[0]
    return losses.sum(), losses.numel()


def batch_rows(batch: Any) -> int:
    """Number of samples in a batch: the length of its first tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    for part in parts:
        rows = batch_rows(part)
        if rows:
            return rows
    return 0


class Mean:
    """Adds up batches: what to differentiate in each, and what to divide their sum by."""

    def __init__(self, loss_fn: Callable[..., Any], weight_fn: Callable[[Any], Any] | None) -> None:
        self.loss_fn, self.weight_fn = loss_fn, weight_fn
        self.split = None if weight_fn else split_loss(loss_fn)
        self.values: list[Tensor] = []
        self.weights: list[Any] = []
        self.rows: set[int] = set()

    def numerator(self, output: Any, batch: Any, weight: Any) -> Tensor:
        """The scalar of this batch whose derivatives are to be summed."""
        value, denominator = self._parts(output, batch[1], weight)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"expected loss_fn to return a scalar tensor, got {got}; reduce by mean or sum")
        if isinstance(denominator, Tensor) and denominator.requires_grad:
            raise ValueError("expected a denominator that is constant in the parameters; detach it")
        if weight is None and self.split is None and denominator is _ROWS:
            self.rows.add(batch_rows(batch))
            denominator = 1
        self.values.append(value.detach())
        self.weights.append(denominator)
        return value.reshape(())

    def _parts(self, output: Any, target: Any, weight: Any) -> Parts:
        if self.split is not None:
            return self.split(output, target)
        value = self.loss_fn(output, target)
        if isinstance(value, tuple) and len(value) == 2:
            return value
        return (value, _ROWS) if weight is None else (value * weight, weight)

    def divisor(self) -> float | Tensor:
        """What the sum over the batches is divided by, once all of them have been seen."""
        if not self.values:
            raise ValueError("expected at least one batch that counts, got an empty data set")
        finite = torch.stack([value.reshape(()).isfinite() for value in self.values])
        if not bool(finite.all()):
            index = int((~finite).int().argmax())
            raise ValueError(f"expected a finite loss, got {float(self.values[index])} on batch {index}")
        if len(self.rows) > 1:
            raise ValueError(
                f"batches of {sorted(self.rows)} samples and a loss of unknown weighting: return "
                "(numerator, denominator) from loss_fn, or pass weight_fn=lambda batch: len(batch[1])"
            )
        if all(weight is None for weight in self.weights):
            return 1.0
        total = sum(self.weights)
        if not float(total) > 0:
            raise ValueError(f"expected a positive total weight, got {float(total)}; are all ignored?")
        return total


_ROWS = object()  # a plain callable's batch counts as much as any other of its size
