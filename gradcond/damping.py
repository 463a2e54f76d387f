"""Rate damping: the part of batch normalization that tunes the learning rate by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradcond.conditioner import Conditioner, RowMap, SymmetricMap, square_of
from gradcond.layers import Layer, Rows

__all__ = ["RateDamping"]


@dataclass
class RateDamping(Conditioner):
    r"""Make the steps of each output unit smaller, the further it has been moved.

    Behind batch normalization a unit's weights w count only by their direction, so that the gradient is
    orthogonal to them, every step makes them longer, and a step of the direction shrinks like lr / |w|^2: the
    rate falls by itself until the steps are harmless. A conditioner of gradients leaves the length alone; this
    is the missing part. In the coordinates of the chain before it, theta = P z, with z_u the row of unit u, its
    bias included, the t-th step would move the unit, relatively, by

        rho_u = lr / (1 - momentum) |P^T g|_u / max(|z_u|, floor^1/2 q),    S_u <- S_u + rho_u^2,

    and its gradient is multiplied by D_u = (1 + strength (1 + delay / t) S_u)^-1/2. So M becomes D^1/2 M D^1/2,
    which has a factor as before, and is `preconditioner()`'s. In the limit of large rates the steps no longer
    depend on the rate; `delay` holds back the first ones. It comes last in a chain, before NormClipping.

    lr and momentum are those of the weight's parameter group; where a group has no "lr" it raises. Optimizers
    that rescale the gradient by themselves, as Adam does, take the damping out again.

    Args:
        strength: of the damping; 0 leaves M as it is.
        delay: in steps.
        floor: least |z_u|^2, in units of the chain's q^2: a unit that starts at zero can move.

    Raises:
        ValueError: for a negative setting.

    References:
        The effect: Arora, Li, Lyu, "Theoretical Analysis of Auto Rate-Tuning by Batch Normalization", ICLR 2019,
        https://arxiv.org/abs/1812.03981. The form in conditioned coordinates and its constants are our own; the
        constants were found on MNIST and CIFAR-10, see analysis/RESULTS.md.

    Example:
        >>> layer = Layer("fc", torch.nn.Linear(1, 1, bias=False))
        >>> theta, gradient = Rows(torch.tensor([[[2.0]]]), None), Rows(torch.tensor([[[2.0]]]), None)
        >>> damping, state = RateDamping(strength=3, delay=0), {}
        >>> damping.update_rate(state, None, theta, gradient, rate=1.0)  # rho = 1
        >>> damping.row_map(layer, state).apply(gradient).weight
        tensor([[[1.]]])
    """

    strength: float = 5.0
    delay: float = 80.0
    floor: float = 1e-2

    acts_on_bias: ClassVar[bool] = True
    uses_rate: ClassVar[bool] = True
    row_wise = False  # its state is of all rows

    def __post_init__(self) -> None:
        if not (self.strength >= 0 and self.delay >= 0 and self.floor >= 0):
            raise ValueError(
                f"RateDamping: strength, delay and floor must not be negative, got {self.strength}, {self.delay} "
                f"and {self.floor}"
            )

    def update_rate(
        self, state: dict[str, Any], chain: RowMap | None, theta: Rows, gradient: Rows, rate: float | Tensor
    ) -> None:
        """Adds one step's relative motion of the units, and sets their factors; in float32 or better."""
        theta, gradient = _wide(theta), _wide(gradient)
        if chain is None:
            size, slope, least = square_of(theta), square_of(gradient), self.floor
        else:
            (size, slope), least = chain.squares(theta, gradient), self.floor * chain.scale**2
        relative = slope.div_(size.clamp_min_(max(least, torch.finfo(size.dtype).tiny)))
        state["steps"] = t = state.get("steps", 0) + 1
        before = state.get("sum")
        state["sum"] = total = relative.mul_(rate**2) if before is None else relative.mul_(rate**2).add_(before)
        state["factor"] = (total * (self.strength * (1 + self.delay / t))).add_(1).rsqrt_()

    def row_map(self, layer: Layer, state: dict[str, Any]) -> RowMap | None:
        """D^1/2 of the last step; the identity before the first one."""
        if "factor" not in state or self.strength == 0:
            return None
        return RowScaling(state["factor"], layer.taps)

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """A sum and a factor per output unit."""
        return {"sum": (layer.groups, layer.units), "factor": (layer.groups, layer.units)}

    def describe(self, layer: Layer, state: dict[str, Any]) -> str:
        """The range of the factors."""
        if "factor" not in state:
            return "no step yet: identity"
        return f"factors {state['factor'].min():.2g} to {state['factor'].max():.2g}"


def _wide(rows: Rows) -> Rows:
    """Rows whose squares neither overflow nor vanish, and whose sum over many steps goes on growing."""
    if rows.weight.dtype.itemsize >= 4:
        return rows
    return Rows(rows.weight.float(), None if rows.bias is None else rows.bias.float())


@dataclass(frozen=True)
class RowScaling(SymmetricMap):
    """P = diag(s), one number per row."""

    square: Tensor  # (groups, out), of s
    taps: int

    comes_first: ClassVar[bool] = True  # D^1/2 P, which is P D^1/2 for every P that acts on each row by itself
    scales_rows: ClassVar[bool] = True

    @property
    def s(self) -> Tensor:
        """One number per row."""
        return self.square.sqrt()

    def _times(self, rows: Rows, s: Tensor) -> Rows:
        weight = rows.weight * self._wide(s)
        return Rows(weight, None if rows.bias is None else rows.bias * s)

    def _times_(self, rows: Rows, s: Tensor) -> None:
        rows.weight.mul_(self._wide(s))
        if rows.bias is not None:
            rows.bias.mul_(s)

    def _wide(self, s: Tensor) -> Tensor:
        return s[(...,) + (None,) * (1 + self.taps)]

    def factor(self, rows: Rows) -> Rows:
        """S z."""
        return self._times(rows, self.s)

    def factor_(self, rows: Rows) -> None:
        """The same in place."""
        self._times_(rows, self.s)

    def apply(self, rows: Rows) -> Rows:
        """s^2 g."""
        return self._times(rows, self.square)

    def apply_(self, rows: Rows, found: Tensor | None = None) -> None:
        """The same in place, of a matrix as well."""
        if rows.weight.dim() > 2:
            return self._times_(rows, self.square)
        square = self.square.view(-1)
        rows.weight.mul_(square[:, None])
        if rows.bias is not None:
            rows.bias.mul_(square)

    def inverse(self, rows: Rows) -> Rows:
        """Theta / s."""
        return self._times(rows, 1 / self.s)
