"""Conditioner, the laws that each one keeps, and the chain of several as nested changes of variables.

A conditioner is a change of variables theta = P z on each row [bias, weights] of a layer's parameters. Training
in z moves theta along M g with M = P P^T, and sees the Hessian P^T H P. Hence the laws, each a test that every
conditioner passes: M is linear, symmetric, positive semi-definite, equal to P P^T to rounding, keeps dtype,
device and strides, and is the identity as long as there are no statistics.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gradcond.layers import Layer, Rows
from gradcond.statistics import Moments

__all__ = ["Chain", "Conditioner", "RowMap", "Squares", "SymmetricMap", "compose", "joined", "map_", "square_of"]


class Squares(NamedTuple):
    """Of each row of a layer, in the coordinates of a chain; and the chain's scale."""

    size: Tensor  # |P^+ theta|^2, (groups, out)
    slope: Tensor  # |P^T g|^2
    scale: float


class RowMap(ABC):
    """One layer's P at one moment; it holds tensors of its own, so later steps do not change it."""

    @abstractmethod
    def factor(self, rows: Rows) -> Rows:
        """P z."""

    @abstractmethod
    def factor_transpose(self, rows: Rows) -> Rows:
        """P^T v."""

    def apply(self, rows: Rows) -> Rows:
        """M g = P P^T g; methods with a shorter closed form override it."""
        return self.factor(self.factor_transpose(rows))

    on_matrix: bool = False  # do `screen`, `apply_` and `squares` take Linear's weight and bias as they are, too?
    comes_first: ClassVar[bool] = False  # is it outermost, wherever its conditioner stands?
    on_each_row: ClassVar[bool] = False  # does it act on each row by itself? Then it commutes with `scales_rows`
    scales_rows: ClassVar[bool] = False  # is it one number per row?
    joins_biases: bool = True  # are several biases of a row one number to it, their sum?

    def squares(self, theta: Rows, gradient: Rows) -> Squares:
        """|P^+ theta|^2 and |P^T g|^2 of each row, (groups, out)."""
        return Squares(square_of(self.inverse(theta)), square_of(self.factor_transpose(gradient)), self.scale)

    def inverse(self, rows: Rows) -> Rows:
        """P^+ theta: the shortest z of theta = P z, or of what P reaches of theta; of a chain, one such z."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say what its coordinates z of given parameters are; define inverse()"
        )

    @property
    def scale(self) -> float:
        """Q of P = (1/q) ...: the size of z where the layer's outputs are of size one."""
        return 1.0

    def screen(self, rows: Rows) -> Tensor | None:
        """A first pass over the weights of g, from which `apply_` goes on: finite exactly when they are.

        None where there is no such pass; then the weights are looked at by themselves.
        """
        return None

    def apply_(self, rows: Rows, found: Tensor | None = None) -> None:
        """Replaces g by M g in place, given what `screen` has found; methods that need no copy override it."""
        _put(self.apply(rows), rows)


class SymmetricMap(RowMap):
    """A map whose factor is its own transpose."""

    def factor_transpose(self, rows: Rows) -> Rows:
        """P^T v = P v."""
        return self.factor(rows)

    def factor_(self, rows: Rows) -> None:
        """Replaces z by P z in place."""
        _put(self.factor(rows), rows)


@dataclasses.dataclass(frozen=True)
class Chain(RowMap):
    """Nested changes of variables, outermost first: [A, B] has P = P_A P_B and M = P_A P_B P_B^T P_A^T."""

    maps: tuple[RowMap, ...]

    def factor(self, rows: Rows) -> Rows:
        """P_A P_B ... z."""
        for row_map in reversed(self.maps):
            rows = row_map.factor(rows)
        return rows

    def factor_transpose(self, rows: Rows) -> Rows:
        """... P_B^T P_A^T v."""
        for row_map in self.maps:
            rows = row_map.factor_transpose(rows)
        return rows

    def inverse(self, rows: Rows) -> Rows:
        """... P_B^+ P_A^+ theta."""
        for row_map in self.maps:
            rows = row_map.inverse(rows)
        return rows

    @property
    def scale(self) -> float:
        """The product of the members'."""
        return math.prod(row_map.scale for row_map in self.maps)

    @property
    def joins_biases(self) -> bool:  # type: ignore[override]
        """Where one of the members does."""
        return any(row_map.joins_biases for row_map in self.maps)

    @property
    def on_matrix(self) -> bool:  # type: ignore[override]
        """Where rows are scaled after one map that can take them so."""
        outermost, *inner = self.maps
        return outermost.scales_rows and len(inner) == 1 and inner[0].on_each_row and inner[0].on_matrix

    def apply(self, rows: Rows) -> Rows:
        """P_A M_B P_A^T g: the innermost map in its closed form, the others around it."""
        *outer, inner = self.maps
        around = Chain(tuple(outer))
        return around.factor(inner.apply(around.factor_transpose(rows)))

    def apply_(self, rows: Rows, found: Tensor | None = None) -> None:
        """The same in place, where the outermost map is its own transpose."""
        outermost, *inner = self.maps
        if not isinstance(outermost, SymmetricMap):
            return super().apply_(rows)
        within = Chain(tuple(inner)) if len(inner) > 1 else inner[0]
        if outermost.scales_rows and all(row_map.on_each_row for row_map in inner):
            within.apply_(rows)
            return outermost.apply_(rows)
        outermost.factor_(rows)
        within.apply_(rows)
        outermost.factor_(rows)


class Conditioner(ABC):
    """A way to condition gradients: a dataclass of hyper-parameters that gives each layer its P.

    A conditioner holds no state of a layer itself; the optimizer keeps one dictionary of tensors and numbers for
    each layer and passes it in. A new method is a subclass, decorated as a dataclass, that overrides `row_map`
    and what else it needs. Subclasses are found by their names when a checkpoint is read.

    Example:
        >>> import torch
        >>> @dataclasses.dataclass
        ... class Halve(Conditioner):
        ...     '''P = I / sqrt(2), so M = I / 2.'''
        ...     def row_map(self, layer, state):
        ...         return Scale(0.5**0.5)
        >>> @dataclasses.dataclass(frozen=True)
        ... class Scale(SymmetricMap):
        ...     s: float
        ...     def factor(self, rows):
        ...         return Rows(self.s * rows.weight, None if rows.bias is None else self.s * rows.bias)
        >>> Scale(0.5**0.5).apply(Rows(torch.tensor([[[2.0, 4.0]]]), None)).weight
        tensor([[[1.0000, 2.0000]]])
    """

    registry: ClassVar[dict[str, type[Conditioner]]] = {}
    uses_inputs: ClassVar[bool] = False  # does it need the moments of the layers' inputs?
    is_projection: ClassVar[bool] = False  # M M = M
    acts_on_bias: ClassVar[bool] = False
    uses_rate: ClassVar[bool] = False  # does P depend on the step's gradient and learning rate? Then update_rate
    fixed: ClassVar[bool] = False  # does P depend on the settings and the layer's shape alone?
    comes_last: ClassVar[bool] = False  # does it act on all gradients together, once they are conditioned?
    taps: bool = False  # does it need the moments of every tap?
    ghost: int | None = None  # from how many rows of each call? None: all
    row_wise = True  # does M act on each row by itself? Then ranks that hold whole rows need not meet

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Conditioner.registry[cls.__name__] = cls

    @property
    def name(self) -> str:
        """The class's name: how reports and checkpoints call it."""
        return type(self).__name__

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters by name, as a checkpoint keeps them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    def check(self, values: Mapping[str, Any]) -> None:
        """Raises ValueError for hyper-parameters that there are none of, or values out of their range."""
        settings = self.settings()
        for key in values:
            if key not in settings:
                raise ValueError(f"{self.name} has no hyper-parameter {key!r}; it has {list(settings)}")
        type(self)(**{**settings, **values})

    def refusal(self, layer: Layer) -> str | None:
        """Why a layer is left alone, or None when it is conditioned."""
        return None

    def is_due(self, state: dict[str, Any]) -> bool:
        """Does the coming step need the layer's input moments?"""
        return self.uses_inputs

    def update(self, state: dict[str, Any], moments: Moments) -> None:
        """Folds one step's input moments into a layer's state; called in every step that is due."""

    def update_all(
        self, states: Sequence[dict[str, Any]], moments: Sequence[Moments], scratch: dict[str, Any]
    ) -> None:
        """`update` for all layers of a step; `scratch` is kept between the steps, and never saved."""
        for state, m in zip(states, moments, strict=True):
            self.update(state, m)

    def condition_all_(
        self,
        parameters: Sequence[tuple[Tensor, Tensor]],
        gradients: Sequence[tuple[Tensor, Tensor]],
        states: Sequence[dict[str, Any]],
        moments: Sequence[Moments],
        scratch: dict[str, Any],
        squares: list[Squares] | None = None,
    ) -> bool:
        """`update_all`, and then M g for the weights' and biases' gradients of Linear layers, in place, at one go.

        Args:
            parameters: each layer's weight and bias.
            gradients: theirs.
            states: of the layers.
            moments: of the step.
            scratch: as for `update_all`.
            squares: takes in those of each layer, for a conditioner that comes after.

        Returns:
            False, with nothing touched, where each layer must be asked by itself.
        """
        return False

    def scale_all(
        self, squares: Sequence[Squares], states: Sequence[dict[str, Any]], rate: float, scratch: dict[str, Any]
    ) -> Sequence[Tensor]:
        """`update_rate` for all layers at one go, and what it multiplies their rows by.

        Only of a conditioner whose map `scales_rows`.
        """
        raise NotImplementedError(f"{type(self).__name__} scales no rows; define scale_all()")

    def update_rate(
        self, state: dict[str, Any], chain: RowMap | None, theta: Rows, gradient: Rows, rate: float | Tensor
    ) -> None:
        """Takes in one step's gradient, given the P of the conditioners before; called when `uses_rate`."""

    def clip_factor(self, state: dict[str, Any], norm: Tensor, *, fold: bool) -> Tensor:
        """The factor of all gradients, given sqrt(<g, M g>); called when `comes_last`."""
        return torch.ones_like(norm)

    def wait(self, state: dict[str, Any]) -> None:
        """A step that was not due has passed."""

    @abstractmethod
    def row_map(self, layer: Layer, state: dict[str, Any]) -> RowMap | None:
        """A layer's P from its state and its weights as they are; None is the identity."""

    def enter_(self, layer: Layer, state: dict[str, Any]) -> None:
        """Puts a layer's weights where the method wants them, before the first step."""

    def retract_(self, layer: Layer, state: dict[str, Any]) -> None:
        """Puts a layer's weights back there, after every step."""

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors in a layer's state, by which a saved state is checked.

        What there is per input has one axis, (inputs,); what there is per row, more: (groups, units, ...).
        """
        return {}

    def describe(self, layer: Layer, state: dict[str, Any]) -> str:
        """What a report says of a layer beyond the method's name."""
        return ""


def joined(layer: Layer, weights: Sequence[Tensor], biases: Sequence[Tensor], share: float = 1.0) -> Rows:
    """Rows of tensors shaped like a layer's parameters: several biases as their sum divided by `share`."""
    bias = None
    if biases:
        first, *others = (layer.part(b, -1) for b in biases)
        bias = sum(others, first) / share if others else first
    return layer.rows(layer.join(weights), bias)


def map_(method: str, layer: Layer, row_map: RowMap, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """Replaces tensors shaped like a layer's parameters by P z, P^T v or M g of them, in place.

    Several biases share their one direction: with k of them P is E P (E^T k^1/2), E = (1, ..., 1)^T / k on the
    bias and the identity on the weights; E P E^T with E = (1, ..., 1)^T / k^1/2 where the map does not join them.

    Args:
        method: "factor", "factor_transpose" or "apply".
        layer: whose rows they are.
        row_map: P on [bias, weights].
        weights: one per weight parameter; leading batch axes are kept.
        biases: one per bias parameter that is trained, or none.
    """
    k = len(biases)
    alike = k**0.5
    share = alike if method == "factor" or not row_map.joins_biases else k
    spread = alike if method == "factor_transpose" or not row_map.joins_biases else k
    rows = joined(layer, weights, biases, share)
    if method == "apply" and k < 2 and len(weights) == 1:
        return row_map.apply_(rows)
    mapped: Rows = getattr(row_map, method)(rows)
    if len(weights) == 1:
        rows.weight.copy_(mapped.weight)
    else:
        axis = -1 - layer.taps
        parts = mapped.weight.squeeze(axis - 2).split([w.shape[axis] for w in weights], axis)
        for weight, part in zip(weights, parts, strict=True):
            layer.part(weight, axis - 1).copy_(part)
    if mapped.bias is not None and mapped.bias is not rows.bias:  # the same one: nobody has touched it
        shared = mapped.bias if k == 1 else mapped.bias / spread
        for b in biases:
            layer.part(b, -1).copy_(shared.flatten(-2))


def square_of(rows: Rows) -> Tensor:
    """Squared length of each row: (groups, out)."""
    squares = rows.weight.square()
    squares = squares.sum(1)[None] if squares.dim() == 2 else squares.flatten(2).sum(2)
    return squares if rows.bias is None else squares + rows.bias.square()


def _put(mapped: Rows, rows: Rows) -> None:
    rows.weight.copy_(mapped.weight)
    if rows.bias is not None and mapped.bias is not None and mapped.bias is not rows.bias:
        rows.bias.copy_(mapped.bias)


def compose(maps: Sequence[RowMap | None]) -> RowMap | None:
    """The chain of the maps that are there: None when all are the identity, itself when there is one."""
    there = [m for m in maps if m is not None]
    if len(there) < 2:
        return there[0] if there else None
    return Chain(tuple(sorted(there, key=lambda m: not m.comes_first)))
