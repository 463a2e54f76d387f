"""Weight standardization without a layer: the gradient's tangent map, and the manifold it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradcond.centralization import unmovable
from gradcond.conditioner import Conditioner, RowMap, SymmetricMap
from gradcond.layers import Layer, Rows

__all__ = ["WeightStandardization"]


@dataclass
class WeightStandardization(Conditioner):
    r"""Keep each output unit's weights at mean zero and a fixed deviation, as weight standardization does.

    With w_c = C w the centered row and s its deviation, the gradient goes through

        M = (1 / s^2) (C - w_c w_c^T / |w_c|^2),    P = (1 / s) (C - w_c w_c^T / |w_c|^2),

    which is symmetric, positive semi-definite and, times s^2, the projection on the tangent space of the rows
    of mean zero and deviation s. At the first step every row is put on that manifold, and after every step back
    onto it. To first order in the learning rate this is training v in w = s (v - mean(v)) / std(v), started at
    v = s w; with gain=1 that is the filter of a weight-standardizing layer, started at v = w. Biases and rows
    of one or two weights, on which the manifold has no tangent, are left alone.

    Args:
        eps: added to s in M; a layer with a row of no larger deviation is left alone.
        gain: the deviation that all rows are given at the first step; None keeps each row's own.

    Raises:
        ValueError: for a negative eps or a gain that is not positive.

    References:
        Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization", 2019, https://arxiv.org/abs/1903.10520. The deviation is unbiased and eps is added to
        it, as in the authors' public code; the optimizer-side form is derived here.

    Example:
        >>> layer = Layer("fc", torch.nn.Linear(3, 1))
        >>> _ = layer.module.weight.data.copy_(torch.tensor([[0.0, 1.0, 2.0]]))
        >>> row_map = WeightStandardization(eps=0).row_map(layer, {})
        >>> row_map.apply(layer.rows(torch.tensor([[1.0, 0.0, 2.0]]), None)).weight  # no mean, no radial part
        tensor([[[ 0.5000, -1.0000,  0.5000]]])
    """

    eps: float = 1e-5
    gain: float | None = None

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise ValueError(f"WeightStandardization: eps must not be negative, got {self.eps}")
        if self.gain is not None and not self.gain > 0:
            raise ValueError(f"WeightStandardization: gain must be positive, or None, got {self.gain}")

    def refusal(self, layer: Layer) -> str | None:
        """Rows too short, or constant rows, which have no deviation to keep."""
        if (reason := unmovable(layer)) is not None:
            return reason
        if layer.fan_in < 3:
            return "rows of one or two weights have no tangent: standardized, they would be frozen"
        if bool((_deviation(layer) <= self.eps).any()):
            return f"it has constant rows, whose deviation is at most eps={self.eps:g}"
        return None

    def row_map(self, layer: Layer, state: dict[str, Any]) -> RowMap:
        """The tangent map at the weights as they are."""
        centered, norm = _polar(layer)
        unit, deviation = centered.div_(norm).to(layer.weight.dtype), _deviation(layer, norm)
        if self.gain is not None:  # where the rows are from the first step on
            deviation = torch.full_like(deviation, self.gain)
        return Tangent(unit, deviation + self.eps, layer.taps)

    def enter_(self, layer: Layer, state: dict[str, Any]) -> None:
        """Records each row's deviation (or the gain) and puts the row on the manifold."""
        deviation = _deviation(layer)
        state["deviation"] = deviation if self.gain is None else torch.full_like(deviation, self.gain)
        self.retract_(layer, state)

    @torch.no_grad()
    def retract_(self, layer: Layer, state: dict[str, Any]) -> None:
        """W <- deviation * (w - mean) / std."""
        centered, norm = _polar(layer)
        centered.mul_(state["deviation"] * (layer.fan_in - 1) ** 0.5 / norm)
        layer.rows(layer.weight, None).weight.copy_(centered)

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """One deviation per output unit."""
        return {"deviation": (layer.groups, layer.units, 1, *[1] * layer.taps)}

    def describe(self, layer: Layer, state: dict[str, Any]) -> str:
        """That the weights themselves are moved."""
        kept = "their own deviation" if self.gain is None else f"deviation {self.gain}"
        if "deviation" not in state:
            return f"rows will be put to mean 0 and {kept} at the first step"
        return f"rows were put to mean 0 and {kept} at the first step, and are after every step"


@dataclass(frozen=True)
class Tangent(SymmetricMap):
    """P = (1/s) (C - u u^T) with u a centered row of norm one."""

    unit: Tensor  # (groups, out, in, *taps)
    deviation: Tensor  # (groups, out, 1, 1...)
    taps: int

    joins_biases = False

    def _project(self, weight: Tensor) -> Tensor:
        axes = tuple(range(-1 - self.taps, 0))
        weight = weight - weight.mean(axes, keepdim=True)
        return weight - self.unit * (self.unit * weight).sum(axes, keepdim=True)

    def factor(self, rows: Rows) -> Rows:
        """Projected, then divided by s."""
        return Rows(self._project(rows.weight) / self.deviation, rows.bias)

    def inverse(self, rows: Rows) -> Rows:
        """Projected, then times s."""
        return Rows(self._project(rows.weight) * self.deviation, rows.bias)

    def apply(self, rows: Rows) -> Rows:
        """Projected, then divided by s^2."""
        return Rows(self._project(rows.weight) / self.deviation.square(), rows.bias)

    def apply_(self, rows: Rows, found: Tensor | None = None) -> None:
        """In place."""
        axes = tuple(range(-1 - self.taps, 0))
        rows.weight.sub_(rows.weight.mean(axes, keepdim=True))
        along = (self.unit * rows.weight).sum(axes, keepdim=True)
        rows.weight.addcmul_(self.unit, along, value=-1).div_(self.deviation.square())


@torch.no_grad()
def _polar(layer: Layer) -> tuple[Tensor, Tensor]:
    """The rows of a layer's weight less their means, and their norms; in float32 or better."""
    weight = layer.rows(layer.weight, None).weight
    axes = tuple(range(-1 - layer.taps, 0))
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    centered = weight - weight.mean(axes, keepdim=True)  # on a CPU a fifth of the time of torch.std_mean
    norm = torch.linalg.vector_norm(centered, dim=axes, keepdim=True)
    return centered, norm.clamp_min_(torch.finfo(norm.dtype).tiny)


def _deviation(layer: Layer, norm: Tensor | None = None) -> Tensor:
    """The rows' unbiased deviations."""
    norm = _polar(layer)[1] if norm is None else norm
    return (norm / (layer.fan_in - 1) ** 0.5).to(layer.weight.dtype)
