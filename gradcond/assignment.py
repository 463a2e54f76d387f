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
    has_bias: bool  # is the bias trained, too?
    members: tuple[int, ...]

    def with_gradients(self) -> Assignment:
        """This assignment, without the bias when no gradient reached it."""
        return replace(self, has_bias=self.has_bias and self.layer.module.bias.grad is not None)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias when it is trained."""
        module = self.layer.module
        return [module.weight, module.bias] if self.has_bias else [module.weight]


def held_parameters(groups: Iterable[Mapping[str, Any]]) -> set[int]:
    """The ids of the parameters in these groups, those of groups with `gradcond=False` left out."""
    return {id(p) for group in groups if group.get("gradcond", True) for p in group["params"]}


def trained(parameter: nn.Parameter | None, held: set[int]) -> bool:
    """Is a parameter trained by an optimizer that holds these?"""
    return parameter is not None and parameter.requires_grad and id(parameter) in held
