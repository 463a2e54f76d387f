"""Rate damping: the part of batch normalization that tunes the learning rate by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradcond.conditioner import Conditioner, RowMap, Squares, SymmetricMap, square_of
from gradcond.finite import flattened
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

    The two biases of a recurrent layer's row move alike; behind BNP, to which their sum is one bias, by half each.
    lr and momentum are those of the weight's parameter group, lr times 1 - dampening where that dampens the
    momentum; where a group has no "lr" it raises. Optimizers that rescale the gradient by themselves, as Adam
    does, take the damping out again.

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
            squares = Squares(square_of(theta), square_of(gradient), 1.0)
        else:
            squares = chain.squares(theta, gradient)
        self._update(state, squares, rate)

    def _update(self, state: dict[str, Any], squares: Squares, rate: float | Tensor) -> None:
        size, slope, _ = squares
        relative = slope.div_(size.clamp_min_(self._least(squares))).mul_(rate**2)
        state["steps"] = state.get("steps", 0) + 1
        before = state.get("sum")
        state["sum"] = total = relative if before is None else relative.add_(before.to(relative))
        state["factor"] = (total * self._strength(state["steps"])).add_(1).rsqrt_()

    def _least(self, squares: Squares) -> float:
        return max(self.floor * squares.scale**2, torch.finfo(squares.size.dtype).tiny)

    def _strength(self, steps: int) -> float:
        return self.strength * (1 + self.delay / steps)

    def scale_all(
        self, squares: Sequence[Squares], states: Sequence[dict[str, Any]], rate: float, scratch: dict[str, Any]
    ) -> Sequence[Tensor]:
        """The same for all layers, side by side where they are in step."""
        units: _Units | None = scratch.get("units")
        if units is None or not units.hold(squares, states):
            kinds = {
                (own.size.dtype, own.size.device, state.get("steps"))
                for own, state in zip(squares, states, strict=True)
            }
            if len(kinds) > 1 or "sum" not in states[0]:
                for own, state in zip(squares, states, strict=True):
                    self._update(state, own, rate)
                return [state["factor"] for state in states]
            scratch["units"] = units = _Units(squares, states)
        units.add(squares, [self._least(own) for own in squares], rate**2)
        for state in states:
            state["steps"] += 1
        return units.factors(self._strength(states[0]["steps"]))

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
        if not state["factor"].numel():
            return "no units"
        return f"factors {state['factor'].min():.2g} to {state['factor'].max():.2g}"


class _Units:
    """The sums and factors of several layers side by side; their states hold views of it from then on."""

    def __init__(self, squares: Sequence[Squares], states: Sequence[dict[str, Any]]) -> None:
        sizes = [state["sum"].numel() for state in states]
        self.sum = torch.cat([state["sum"].flatten() for state in states]).to(squares[0].size)
        self.factor = torch.empty_like(self.sum)
        self.views = [
            (a[None], b[None]) for a, b in zip(self.sum.split(sizes), self.factor.split(sizes), strict=True)
        ]
        self.sizes = torch.tensor(sizes)
        self.least: tuple[list[float], Tensor] = [], self.sum
        for state, (total, factor) in zip(states, self.views, strict=True):
            state["sum"], state["factor"] = total, factor

    def hold(self, squares: Sequence[Squares], states: Sequence[dict[str, Any]]) -> bool:
        """Are these the states whose sums it holds, in step, and what is added of its kind?"""
        steps, kind = states[0].get("steps"), (self.sum.dtype, self.sum.device)
        for own, state, (total, _) in zip(squares, states, self.views, strict=True):
            if (
                state.get("sum") is not total
                or state["steps"] != steps
                or (own.size.dtype, own.size.device) != kind
            ):
                return False
        return True

    def add(self, squares: Sequence[Squares], least: list[float], rate: float) -> None:
        """One step's squares of relative motions, times a number."""
        if self.least[0] != least:
            self.least = least, torch.tensor(least).repeat_interleave(self.sizes).to(self.sum)
        size, slope = (flattened(list(own)) for own in zip(*((s.size, s.slope) for s in squares), strict=True))
        self.sum.add_(slope.div_(torch.maximum(size, self.least[1])).mul_(rate))

    def factors(self, strength: float) -> list[Tensor]:
        """(1 + strength sum)^-1/2."""
        torch.mul(self.sum, strength, out=self.factor).add_(1).rsqrt_()
        return [factor for _, factor in self.views]


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
    joins_biases = False

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
