"""Gradient centralization, and the projection of the weights that belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradcond.conditioner import Conditioner, RowMap, SymmetricMap
from gradcond.layers import Layer, Rows

__all__ = ["GradientCentralization", "WeightCentralization"]

ONE_HOT = "its inputs are one-hot: a row's weights meet one at a time, and their mean never"


def unmovable(layer: Layer) -> str | None:
    """Why no method puts the rows themselves anywhere, or None when they can be."""
    if layer.one_hot:
        return ONE_HOT
    if len(layer.weight_names) > 1 or isinstance(layer.module, nn.RNNBase):  # of a GRU some rows are of one weight
        return "several weights make one row, and are not moved together"
    return None


@dataclass
class GradientCentralization(Conditioner):
    r"""Subtract from each output unit's weight gradient its mean over the fan-in (biases are left alone).

    M = P = C, the projection C = I - 1 1^T / n on rows of n = fan_in weights: symmetric, positive
    semi-definite and idempotent, so under SGD each unit's mean weight stays what it was. side="output" centers
    each weight over the output units of its group instead, as the derivative of LayerNorm's mean does, and
    "both" does both.

    Args:
        conv_only: leave Linear layers alone.
        side: "input", "output" or "both".

    Raises:
        ValueError: for another side.

    References:
        Yong, Huang, Hua, Zhang, "Gradient Centralization: A New Optimization Technique for Deep Neural
        Networks", ECCV 2020, https://arxiv.org/abs/2004.01461. The output axis here comes from the module's
        type, so transposed convolutions are centered over their inputs, too.

    Example:
        >>> layer = Layer("fc", torch.nn.Linear(3, 1))
        >>> row_map = GradientCentralization().row_map(layer, {})
        >>> row_map.apply(layer.rows(torch.tensor([[1.0, 2.0, 6.0]]), None)).weight
        tensor([[[-2., -1.,  3.]]])
    """

    conv_only: bool = False
    side: str = "input"

    is_projection: ClassVar[bool] = True
    fixed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.side not in ("input", "output", "both"):
            raise ValueError(f'GradientCentralization: side must be "input", "output" or "both", got {self.side!r}')

    @property
    def row_wise(self) -> bool:  # type: ignore[override]
        """Centering over the output units looks across rows."""
        return self.side == "input"

    def refusal(self, layer: Layer) -> str | None:
        """Linear layers under conv_only, and layers where centering would leave nothing."""
        if self.conv_only and not layer.convolution:
            return "conv_only"
        if layer.one_hot:
            return ONE_HOT
        if self.side != "output" and layer.fan_in == 1:
            return "one weight per output unit: centered, it would be frozen"
        if self.side != "input" and layer.units == 1:
            return "one output unit per group: centered over units, it would be frozen"
        return None

    def row_map(self, layer: Layer, state: dict[str, Any]) -> RowMap:
        """The projection, the same at every step."""
        inputs = tuple(range(-1 - layer.taps, 0))
        sides = {"input": (inputs,), "output": ((-2 - layer.taps,),)}
        return Centering(sides.get(self.side, sides["input"] + sides["output"]))


@dataclass(frozen=True)
class Centering(SymmetricMap):
    """Subtracts the mean of the weights over each group of axes in turn."""

    axes: tuple[tuple[int, ...], ...]

    on_matrix = True
    joins_biases = False

    def factor(self, rows: Rows) -> Rows:
        """C w."""
        weight = rows.weight
        for axes in self.axes:
            weight = weight - weight.mean(axes, keepdim=True)
        return Rows(weight, rows.bias)

    def apply(self, rows: Rows) -> Rows:
        """C C w = C w."""
        return self.factor(rows)

    def apply_(self, rows: Rows, found: Tensor | None = None) -> None:
        """In place, without a copy."""
        for axes in self.axes:
            sums, found = _sums(rows.weight, axes) if found is None else found, None
            rows.weight.sub_(sums, alpha=sums.numel() / rows.weight.numel())

    def screen(self, rows: Rows) -> Tensor:
        """The sums."""
        return _sums(rows.weight, self.axes[0])

    def inverse(self, rows: Rows) -> Rows:
        """C^+ w = C w."""
        return self.factor(rows)


@dataclass
class WeightCentralization(Conditioner):
    r"""Put each output unit's weights back to mean zero after every step (biases are left alone).

    The gradient goes through unchanged: M = I. Under optimizers linear in the gradient the steps are those of
    projected gradient descent, w <- C (w - lr g), and adding GradientCentralization changes nothing; under
    Adam it does, since the second moments then see the centered gradient.

    References:
        Fuhl, Kasneci, "Weight and Gradient Centralization in Deep Neural Networks", 2020,
        https://arxiv.org/abs/2010.00866. The projection after the step is our reading of "only applied during
        training"; how the paper combines its parts is not known to us.

    Example:
        >>> layer = Layer("fc", torch.nn.Linear(3, 1))
        >>> _ = layer.module.weight.data.copy_(torch.tensor([[1.0, 2.0, 6.0]]))
        >>> WeightCentralization().retract_(layer, {})
        >>> layer.module.weight.data
        tensor([[-2., -1.,  3.]])
    """

    def refusal(self, layer: Layer) -> str | None:
        """Rows of one weight, and those of recurrent modules."""
        if (reason := unmovable(layer)) is not None:
            return reason
        return "one weight per output unit: centered, it would be zero" if layer.fan_in == 1 else None

    def row_map(self, layer: Layer, state: dict[str, Any]) -> None:
        """The identity: the projection acts on the weights."""

    @torch.no_grad()
    def retract_(self, layer: Layer, state: dict[str, Any]) -> None:
        """W <- C w."""
        center_(layer, layer.weight)

    def describe(self, layer: Layer, state: dict[str, Any]) -> str:
        """That the weights themselves are moved."""
        return "weights are centered after every step"


def center_(layer: Layer, weight: Tensor) -> None:
    """Subtracts from each output unit's weights their mean, in place."""
    rows = layer.rows(weight, None).weight
    rows -= rows.mean(tuple(range(-1 - layer.taps, 0)), keepdim=True)


def _sums(weight: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Over some axes, in float32 or better: half the time of the mean where there is little to add."""
    return weight.sum(axes, True, dtype=torch.float32 if weight.dtype.itemsize < 4 else None)
