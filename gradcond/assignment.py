"""Which layers an optimizer trains, and which conditioners of a chain take them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gradcond.layers import Layer

__all__ = ["Assignment", "held_parameters", "trained"]


@dataclass(frozen=True)
class Assignment:
    """A layer that an optimizer trains, and the places in the chain of the conditioners that take it."""

    layer: Layer
    weights: tuple[nn.Parameter, ...]
    biases: tuple[nn.Parameter, ...]  # those that are trained, too
    members: tuple[int, ...]
    sharded: bool  # is a parameter a DTensor?
    whole: bool  # must it be gathered, because its rows are spread over ranks or a conditioner sees across them?

    def with_gradients(self) -> Assignment:
        """This assignment, without the biases that no gradient reached."""
        for bias in self.biases:
            if bias.grad is None:
                break
        else:
            return self
        return replace(self, biases=tuple(bias for bias in self.biases if bias.grad is not None))

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The weights, and the biases that are trained."""
        return self.weights + self.biases


def held_parameters(groups: Iterable[Mapping[str, Any]]) -> set[int]:
    """The ids of the parameters in these groups, those of groups with `gradcond=False` left out."""
    return {id(p) for group in groups if group.get("gradcond", True) for p in group["params"]}


def trained(parameter: nn.Parameter | None, held: set[int]) -> bool:
    """Is a parameter trained by an optimizer that holds these?"""
    return parameter is not None and parameter.requires_grad and id(parameter) in held
