"""How each module type shows its gradient as rows and its input as columns.

Every supported weight is seen as (groups, out, in, *taps): `out` output units in each group, each with a row
of `in x taps` weights. The output axis comes from the module's type, never from the shape of a tensor, and all
of it is views, so that any memory format keeps its strides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

__all__ = ["Layer", "Rows", "find_layers"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Rows(NamedTuple):
    """A layer's gradient (or any vector of its parameters), one row [bias, weights] per output unit."""

    weight: Tensor  # (..., groups, out, in, *taps)
    bias: Tensor | None  # (..., groups, out)


class Layer:
    """A module whose weight has rows, under its qualified name in the model.

    Args:
        name: of the module in the model.
        module: an nn.Linear or a convolution.

    Attributes:
        transposed: is the weight (in, out / groups, *taps)?
        convolution: is it a convolution, transposed or not?
        groups: number of groups, 1 for Linear.
        inputs: number of input channels (features for Linear), all groups together.
        units: number of output units of one group.
        taps: number of spatial axes of the kernel, 0 for Linear.
        kernel_size: number of taps of one (output, input) kernel, 1 for Linear.
        fan_in: length of a row: inputs of the unit's group times kernel_size.
        is_called: do forward hooks see its inputs? nn.MultiheadAttention uses its output projection's weight only.

    Example:
        >>> layer = Layer("up", nn.ConvTranspose1d(6, 4, 3, groups=2))
        >>> layer.rows(layer.module.weight, layer.module.bias).weight.shape
        torch.Size([2, 2, 3, 3])
        >>> layer.fan_in, layer.inputs
        (9, 6)
    """

    def __init__(self, name: str, module: Any) -> None:
        first, second, *kernel = module.weight.shape
        self.name = name
        self.module = module
        self.transposed = isinstance(module, _TRANSPOSED)
        self.convolution = isinstance(module, _CONVOLUTIONS + _TRANSPOSED)
        self.groups: int = getattr(module, "groups", 1)
        self.inputs: int = first if self.transposed else second * self.groups
        self.units: int = second if self.transposed else first // self.groups
        self.taps = len(kernel)
        self.kernel_size = math.prod(kernel)
        self.fan_in = self.inputs // self.groups * self.kernel_size
        self.is_called = not isinstance(module, NonDynamicallyQuantizableLinear)

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


def has_lazy(model: nn.Module) -> bool:
    """Does a module still wait for its first input to have its shape?"""
    return any(isinstance(p, UninitializedParameter) for p in model.parameters())


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
