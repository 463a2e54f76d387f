"""How each module type shows its gradient as rows and its input as columns.

Every supported weight is seen as (groups, out, in, *taps): `out` output units in each group, each with a row
of `in x taps` weights. The output axis comes from the module's type, never from the shape of a tensor, and all
of it is views, so that any memory format keeps its strides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

__all__ = ["Layer", "Rows", "find_layers"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Rows(NamedTuple):
    """A layer's gradient (or any vector of its parameters), one row [bias, weights] per output unit."""

    weight: Tensor  # (..., groups, out, in, *taps)
    bias: Tensor | None  # (..., groups, out)


@dataclass(frozen=True)
class Layer:
    """A module whose weight has rows, under its qualified name in the model.

    Example:
        >>> layer = Layer("up", nn.ConvTranspose1d(6, 4, 3, groups=2))
        >>> layer.rows(layer.module.weight, layer.module.bias).weight.shape
        torch.Size([2, 2, 3, 3])
        >>> layer.fan_in, layer.inputs
        (9, 6)
    """

    name: str
    module: Any  # an nn.Linear or a convolution, so that its weight, bias, groups can be read as they are

    @property
    def taps(self) -> int:
        """Number of spatial axes of the kernel: 0 for Linear."""
        return self.module.weight.dim() - 2

    @property
    def groups(self) -> int:
        """Number of groups: 1 for Linear."""
        return getattr(self.module, "groups", 1)

    @property
    def inputs(self) -> int:
        """Number of input channels (features for Linear), all groups together."""
        shape = self.module.weight.shape
        return shape[0] if self.transposed else shape[1] * self.groups

    @property
    def units(self) -> int:
        """Number of output units of one group."""
        shape = self.module.weight.shape
        return shape[1] if self.transposed else shape[0] // self.groups

    @property
    def fan_in(self) -> int:
        """Length of a row: inputs of the unit's group times taps."""
        return self.inputs // self.groups * self.kernel_size

    @property
    def kernel_size(self) -> int:
        """Number of taps of one (output, input) kernel: 1 for Linear."""
        return math.prod(self.module.weight.shape[2:])

    @property
    def transposed(self) -> bool:
        """True for transposed convolutions, whose weight is (in, out / groups, *taps)."""
        return isinstance(self.module, _TRANSPOSED)

    @property
    def convolution(self) -> bool:
        """True for convolutions, transposed ones included."""
        return isinstance(self.module, _CONVOLUTIONS + _TRANSPOSED)

    def rows(self, weight: Tensor, bias: Tensor | None) -> Rows:
        """Views of a weight- and a bias-shaped tensor as rows; leading batch axes are kept.

        Args:
            weight: shaped like the module's weight, with any number of leading axes.
            bias: likewise, or None.

        Returns:
            Rows with weight (..., groups, out, in, *taps) and bias (..., groups, out).
        """
        axis = -2 - self.taps
        weight = weight.unflatten(axis, (self.groups, -1))
        if self.transposed:  # (groups, in, out, *taps)
            weight = weight.transpose(axis, axis + 1)
        return Rows(weight, None if bias is None else bias.unflatten(-1, (self.groups, -1)))

    def columns(self, vector: Tensor) -> Tensor:
        """A vector over the inputs, (inputs,), shaped (groups, 1, in, 1...) so that it multiplies rows."""
        return vector.reshape(self.groups, 1, -1, *[1] * self.taps)

    def channel_axis(self, x: Tensor) -> int:
        """The axis of an input tensor that counts the layer's inputs."""
        return x.dim() - 1 - self.taps


def refusal(module: nn.Module) -> str | None:
    """Why a module cannot be shown as rows, or None when it can."""
    if not isinstance(module, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)):
        return f"{type(module).__name__} has no adapter"
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is computed (parametrized), not a parameter"
    if isinstance(module.weight, UninitializedParameter):
        return "its weight has no shape yet (lazy module)"
    if module.weight.is_complex():
        return "its weight is complex"
    return None


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yields (module name, module, parameter name, parameter) for every place that holds a parameter."""
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield name, module, key, parameter


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """Every module of a model whose gradient can be shown as rows, by qualified name.

    A weight or bias that several modules share belongs to none of them: its gradient mixes their inputs.

    Example:
        >>> list(find_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.LayerNorm(3))))
        ['0']
    """
    places: dict[int, int] = {}
    for _, _, _, parameter in owners(model):
        places[id(parameter)] = places.get(id(parameter), 0) + 1
    layers = {}
    for name, module in model.named_modules():
        if refusal(module) is None and all(places[id(p)] == 1 for p in module.parameters(recurse=False)):
            layers[name] = Layer(name, module)
    return layers
