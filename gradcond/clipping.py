"""Clipping in the conditioned coordinates: the last in a chain, and nonlinear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradcond.conditioner import Conditioner
from gradcond.layers import Layer
from gradcond.shards import is_sharded, local, whole_sum

__all__ = ["Lengths", "NormClipping"]


@dataclass
class NormClipping(Conditioner):
    r"""Hold the length of the conditioned gradient to its running mean.

    With z the coordinates of the chain before it, theta = P z, the gradient of z has the length

        |P^T g| = sqrt(<g, M g>),

    over all parameters of the optimizer, M = I on those that no conditioner takes. All gradients are multiplied
    by min(1, ratio mean / |P^T g|), where the mean runs over the lengths before clipping, this step's included.
    It comes last in a chain. It is not linear, so it has no P: `preconditioner()` is that of the others.

    It takes the edge off single steps. It does not keep a rate that is too high from diverging, since its mean
    follows the gradients up; RateDamping does.

    Args:
        ratio: of the largest length to the running mean, > 0.
        decay: of the running mean, in [0, 1); its start is debiased.

    Raises:
        ValueError: for a setting out of its range.

    Example:
        >>> clipping, state = NormClipping(decay=0.5), {}
        >>> [round(clipping.clip_factor(state, torch.tensor(n), fold=True).item(), 3) for n in (1.0, 4.0, 0.5)]
        [1.0, 0.75, 1.0]
    """

    ratio: float = 1.0
    decay: float = 0.98

    comes_last: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.ratio > 0:
            raise ValueError(f"NormClipping: ratio must be positive, got {self.ratio}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"NormClipping: decay must be in [0, 1), got {self.decay}")

    def row_map(self, layer: Layer, state: dict[str, Any]) -> None:
        """None: it acts on all layers together."""

    def clip_factor(self, state: dict[str, Any], norm: Tensor, *, fold: bool) -> Tensor:
        """The factor of a gradient of this length; `fold` takes the length into the mean first."""
        if fold:
            state["steps"] = state.get("steps", 0) + 1
            a = (1 - self.decay) / (1 - self.decay ** state["steps"])
            state["mean"] = state.get("mean", torch.zeros_like(norm)).lerp(norm, a)
        bound = self.ratio * state["mean"]
        return torch.where(norm > bound, bound / norm, 1.0)

    def describe(self, layer: Layer, state: dict[str, Any]) -> str:
        """That it sees all layers together."""
        return "with all parameters together"


class Lengths:
    """Adds up <g, M g> over all gradients of an optimizer, and scales them."""

    def __init__(self) -> None:
        self.sums: dict[Any, Tensor] = {}  # by where a gradient is sharded
        self.added: set[int] = set()

    def add(self, before: Sequence[Tensor], grads: Sequence[Any]) -> None:
        """Takes in a layer's gradients, as they were and as they are now."""
        for raw, grad in zip(before, grads, strict=True):
            now = local(grad)
            if id(grad) in self.added:  # of several layers, each with rows of its own: what this one has changed
                now = now - raw
            self._add(grad, torch.dot(_wide(raw).flatten(), _wide(now).flatten()))

    def _add(self, grad: Any, square: Tensor) -> None:
        self.added.add(id(grad))
        key = (grad.device_mesh, tuple(grad.placements)) if is_sharded(grad) else None
        self.sums[key] = self.sums.get(key, 0.0) + square.double()

    def clip_(self, clipping: Conditioner, state: dict[str, Any], grads: Sequence[Any], *, fold: bool) -> None:
        """Adds those of these that no conditioner has taken, and multiplies each one by one factor."""
        for grad in grads:
            if id(grad) not in self.added:
                values = grad.coalesce().values() if grad.is_sparse else local(grad)
                self._add(grad, _wide(values).abs().square().sum())
        if self.sums:
            square = torch.stack([whole_sum(s, key) for key, s in self.sums.items()]).sum()
            factor = clipping.clip_factor(state, square.clamp_min(0).sqrt(), fold=fold)
            for grad in grads:
                local(grad).mul_(factor.to(grad.dtype))


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or better, where squares neither overflow nor vanish."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
