"""Which layers an optimizer trains, and which conditioners of a chain take them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import is_
from typing import Any

from torch import nn

from gradcond.conditioner import RowMap, map_
from gradcond.layers import Layer, Rows
from gradcond.shards import local, opened

__all__ = ["Assignment", "Conditioned", "Parameters", "held_parameters", "trained"]


_NEVER: tuple[Any, int, int] = (lambda: None), 0, 0


@dataclass(frozen=True)
class Assignment:
    """A layer that an optimizer trains, and the places in the chain of the conditioners that take it."""

    layer: Layer
    weights: tuple[nn.Parameter, ...]
    biases: tuple[nn.Parameter, ...]  # those that are trained, too
    members: tuple[int, ...]
    sharded: bool  # is a parameter a DTensor?
    whole: bool  # must it be gathered, because its rows are spread over ranks or a conditioner sees across them?
    moves_bias: bool  # does a conditioner act on the biases?
    parameters: tuple[nn.Parameter, ...] = field(init=False)  # the weights, and the biases that are trained
    simple: bool = field(init=False)  # are its rows views of one weight's and one bias's gradient, on every rank?
    matrix: bool = field(init=False)  # and nothing but that weight?

    def __post_init__(self) -> None:
        alone = len(self.weights) == 1 and len(self.biases) < 2 and self.layer.span is None
        plain = not (self.layer.taps or self.layer.groups > 1 or self.layer.transposed)
        object.__setattr__(self, "parameters", self.weights + self.biases)
        object.__setattr__(self, "simple", alone and not self.sharded)
        object.__setattr__(self, "matrix", self.simple and plain)

    def with_gradients(self) -> Assignment:
        """This assignment, without the biases that no gradient reached."""
        for bias in self.biases:
            if bias.grad is None:
                break
        else:
            return self
        return replace(self, biases=tuple(bias for bias in self.biases if bias.grad is not None))

    def rows_of_gradient(self, row_map: RowMap) -> Rows:
        """Views of the gradients of a simple assignment, as a map takes them in place."""
        weight: Any = self.weights[0].grad
        bias = self.biases[0].grad if self.biases and self.moves_bias else None
        if self.matrix and row_map.on_matrix:
            return Rows(weight, bias)
        return self.layer.rows(weight, bias)

    def map_(self, method: str, row_map: RowMap, tensors: Sequence[Any]) -> None:
        """Replaces tensors like the parameters by P z or M g of them."""
        n = len(self.weights)
        if not self.sharded:
            return map_(method, self.layer, row_map, tensors[:n], tensors[n:])
        with opened(tensors, whole=self.whole) as plain:
            map_(method, self.layer, row_map, plain[:n], plain[n:])


class Conditioned:
    """Which layers' gradients have been replaced, and in which version: each is replaced once."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[Any, int, int]] = {}  # its weak reference, its version and its local part's

    def note(self, name: str, grad: Any) -> None:
        """Takes down a layer's gradient as it is now."""
        self._last[name] = weakref.ref(grad), grad._version, local(grad)._version

    def holds(self, name: str, grad: Any) -> bool:
        """Is it this gradient, unchanged since?"""
        last, *versions = self._last.get(name, _NEVER)
        return last() is grad and versions == [grad._version, local(grad)._version]


class Parameters:
    """What the layers show and the groups hold at a step: as long as it is the same, so are the assignments.

    Tensors are compared by identity: layers may be given other ones (FSDP2 does), unfrozen or regrouped.
    """

    def __init__(self, places: Iterable[tuple[Any, str]], groups: Iterable[Mapping[str, Any]]) -> None:
        self.shown = [module._parameters.get(leaf) for module, leaf in places]
        self.trained = [p is not None and p.requires_grad for p in self.shown]
        self.held = [p for group in groups if group.get("gradcond", True) for p in group["params"]]

    def same(self, other: Parameters | None) -> bool:
        """Are they those that another one has seen?"""
        if other is None or self.trained != other.trained:
            return False
        return _identical(self.shown, other.shown) and _identical(self.held, other.held)


def _identical(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def held_parameters(groups: Iterable[Mapping[str, Any]]) -> set[int]:
    """The ids of the parameters in these groups, those of groups with `gradcond=False` left out."""
    return {id(p) for group in groups if group.get("gradcond", True) for p in group["params"]}


def trained(parameter: nn.Parameter | None, held: set[int]) -> bool:
    """Is a parameter trained by an optimizer that holds these?"""
    return parameter is not None and parameter.requires_grad and id(parameter) in held
