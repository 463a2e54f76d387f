"""What each tap of a convolution's kernel meets: the moments of its patches, padding included."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gradcond.layers import Layer

__all__ = ["meets_all", "patch_moments"]

_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def meets_all(layer: Layer) -> bool:
    """Does a convolution have one tap, which meets every input position once and nothing else?"""
    module = layer.module
    if layer.kernel_size > 1:
        return False
    if layer.transposed:
        return not any(module.padding)
    return set(module.stride) == {1} and not any(module._reversed_padding_repeated_twice)


@torch.no_grad()
def patch_moments(layer: Layer, x: Tensor, outputs: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the columns of a convolution's unfolded input.

    Positions are brought together over the batch first, so that no patch is ever written out. A transposed
    convolution's tap meets the input positions whose output it does not crop.

    Args:
        layer: a convolution, transposed or not.
        x: (batch, inputs, *positions), or without the batch axis.
        outputs: the output's positions along each axis.

    Returns:
        Two tensors (inputs, *kernel), in float32 or better.

    Example:
        >>> layer = Layer("", torch.nn.Conv1d(1, 1, 3, padding=1))
        >>> patch_moments(layer, torch.tensor([[3.0, 3.0, 3.0]]), [3])[0]  # the outer taps meet a zero once
        tensor([[2., 3., 2.]])
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    dtype, module, taps = x.dtype, layer.module, layer.taps
    x = x.flatten(0, -2 - taps) if x.dim() > taps + 1 else x[None]
    variance, mean = (t.double() for t in torch.var_mean(x, 0, correction=0))  # (inputs, *positions)
    if not layer.transposed:
        mean, variance = (_padded(module, t) for t in (mean, variance))
    result = mean.new_empty(2, len(mean), layer.kernel_size)
    for index, tap in enumerate(itertools.product(*(range(k) for k in layer.kernel))):
        place = slice(None), *(_met(module, layer.transposed, d, t, outputs[d]) for d, t in enumerate(tap))
        met = mean[place].flatten(1)
        n = max(met.shape[1], 1)  # a tap may meet nothing
        average = met.sum(1) / n
        spread = variance[place].flatten(1) + (met - average[:, None]).square()
        result[..., index] = torch.stack([average, spread.sum(1) / n])
    average, spread = result.unflatten(-1, layer.kernel).to(dtype)
    return average, spread


def _padded(module: torch.nn.Conv2d, positions: Tensor) -> Tensor:
    """What stands at every position once the input is padded: zeros, or copies of other positions."""
    padding = module._reversed_padding_repeated_twice
    return functional.pad(positions[None], padding, mode=_MODES[module.padding_mode])[0]


def _met(module: torch.nn.Conv2d, transposed: bool, axis: int, tap: int, outputs: int) -> slice:
    """The input positions along an axis that a tap meets."""
    stride, dilation = module.stride[axis], module.dilation[axis]
    if not transposed:
        return slice(tap * dilation, tap * dilation + (outputs - 1) * stride + 1, stride)
    # input i gives output i * stride + tap * dilation - padding, which must be in 0..outputs-1
    offset = int(module.padding[axis]) - tap * dilation
    return slice(max(0, -(-offset // stride)), max(0, (outputs - 1 + offset) // stride + 1))
