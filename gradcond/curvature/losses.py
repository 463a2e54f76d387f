"""Torch's own losses taken apart: the loss of each datum, and what it weighs in the mean."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FUNCTION_OF = {
    "CrossEntropyLoss": "cross_entropy",
    "NLLLoss": "nll_loss",
    "NLLLoss2d": "nll_loss",
    "LinearCrossEntropyLoss": "linear_cross_entropy",
    "BCEWithLogitsLoss": "binary_cross_entropy_with_logits",
    "MSELoss": "mse_loss",
}
_CLASS_INDEX = {"cross_entropy", "linear_cross_entropy", "nll_loss"}


@dataclass(frozen=True)
class TorchLoss:
    """A loss of torch, module or function, with its options."""

    name: str  # of the function, where the module has one
    loss_fn: Callable[..., Any]
    reduced: Callable[[str, Any, Tensor], Tensor]  # by another reduction

    @property
    def options(self) -> dict[str, Any]:
        """As they are now; a weight and an ignore_index among them, None where there is none."""
        return {"weight": None, "ignore_index": None, **_options(self.loss_fn)}

    @property
    def is_mean(self) -> bool:
        """Whether there is a denominator."""
        return self.options["reduction"] != "sum"

    def parts(self, output: Any, target: Tensor) -> tuple[Tensor, Any]:
        """(numerator, denominator) of a batch: the whole loss is sum / sum, or the sum where it is None."""
        if not self.is_mean:
            return self.loss_fn(output, target), None
        if self.has_class_targets(target):
            return self.reduced("sum", output, target), self.class_weights(target).sum(dtype=torch.float64)
        losses = self.reduced("none", output, target)
        return losses.sum(), output.shape[0] if self.options["reduction"] == "batchmean" else losses.numel()

    def terms(self, output: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each datum and its weight, both (N,); a datum is a class target or a row of outputs.

        The terms add up to the numerator, and for a mean the weights to the denominator.
        """
        losses = self.reduced("none", output, target)
        if self.has_class_targets(target):
            return losses.reshape(-1), self.class_weights(target).reshape(-1).to(losses.dtype)
        if self.name in _CLASS_INDEX:  # with probabilities: one loss a position
            losses = losses.reshape(-1)
        rows = losses.reshape(losses.shape[:1].numel(), losses.shape[1:].numel())  # not -1: there may be none
        weight = rows.shape[1] if self.options["reduction"] == "mean" else 1
        return rows.sum(1), rows.new_full((rows.shape[0],), weight)

    def has_class_targets(self, target: Tensor) -> bool:
        """Whether the targets are indices of classes."""
        return self.name in _CLASS_INDEX and not target.is_floating_point()

    def class_weights(self, target: Tensor) -> Tensor:
        """What torch adds to the denominator for each class target: label smoothing does not change it."""
        ignored, weight = self.options["ignore_index"], self.options["weight"]
        counted = target != (-100 if ignored is None else ignored)
        return counted if weight is None else weight[target.where(counted, 0)] * counted


def torch_loss(loss_fn: Callable[..., Any]) -> TorchLoss | None:
    """One of torch's losses with its options, or None for anything else: its weighting is unknown."""
    reduced: Callable[[str, Any, Tensor], Tensor]
    if _is_module(loss_fn):
        name, reduced = type(loss_fn).__name__, functools.partial(_of_module, loss_fn)
    else:
        function, given = _parts(loss_fn)
        name = getattr(function, "__name__", "")
        positional = isinstance(loss_fn, functools.partial) and loss_fn.args
        if getattr(F, name, None) is not function or positional or {"size_average", "reduce"} & given.keys():
            return None
        if name == "ctc_loss":  # its mean divides each term by the length of its target
            return None
        if name not in _CLASS_INDEX and given.get("weight") is not None:
            return None
        reduced = functools.partial(_of_function, function, given)
    if _options(loss_fn).get("reduction", "none") == "none":
        return None
    return TorchLoss(_FUNCTION_OF.get(name, name), loss_fn, reduced)


def _is_module(loss_fn: Any) -> bool:
    return type(loss_fn).__module__ == "torch.nn.modules.loss"  # exact: a subclass may compute anything


def _parts(loss_fn: Any) -> tuple[Any, dict[str, Any]]:
    """A function, and the arguments given to it by name."""
    return (loss_fn.func, loss_fn.keywords) if isinstance(loss_fn, functools.partial) else (loss_fn, {})


def _options(loss_fn: Any) -> dict[str, Any]:
    if _is_module(loss_fn):
        return {**vars(loss_fn), **vars(loss_fn).get("_buffers", {})}
    function, given = _parts(loss_fn)
    return {**_defaults(function), **given}


@functools.cache
def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    return {key: parameter.default for key, parameter in inspect.signature(function).parameters.items()}


def _of_module(loss_fn: Any, reduction: str, output: Tensor, target: Tensor) -> Tensor:
    settings = vars(loss_fn)  # a module takes its time to set one
    own, settings["reduction"] = settings["reduction"], reduction
    try:
        return loss_fn(output, target)
    finally:
        settings["reduction"] = own


def _of_function(function: Any, given: dict[str, Any], reduction: str, output: Any, target: Tensor) -> Tensor:
    return function(output, target, **{**given, "reduction": reduction})
