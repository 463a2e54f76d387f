"""The moments of one call's input: of all of it, or of rows drawn from it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradcond.layers import Layer, first_input
from gradcond.moments import channel_moments, is_matrix, moments_of_matrices
from gradcond.patches import meets_all, patch_moments
from gradcond.shards import gathered, is_sharded
from gradcond.statistics import Moments

__all__ = ["Deferred", "Observer", "packs_saved_tensors", "samples_of"]


_MANY = 1000  # passes
_TOP = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # faster, where torch has it


class Deferred:
    """Moments that are taken as the backward pass begins, of the rows that autograd keeps until then."""

    __slots__ = "__weakref__", "moments", "x"

    def __init__(self, x: Tensor) -> None:
        self.x: Tensor | None = x
        self.moments: Moments | None = None


class Observer:
    """Takes the moments of the inputs of a model's layers; of a tensor that several are applied to, once.

    Args:
        taps: for each tap of a convolution what it meets, instead of one number per channel?
        ghost: how many rows (of convolutions: samples) to draw from each call; None takes all.
    """

    def __init__(self, taps: bool, ghost: int | None) -> None:
        self.taps, self.ghost = taps, ghost
        self.seed = 0  # of the rows to draw, moved by every draw
        self.waiting: list[weakref.ref[Deferred]] = []
        self.seen: dict[int, tuple[Callable[[], Tensor | None], int, int, tuple[Tensor, Tensor]]] = {}

    def moments(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Moments | None:
        """The moments of one call's input, in float32 or better; None for an empty or an unseen one."""
        if layer.observe is first_input:
            x = first_input(layer.module, args, kwargs, output)
        else:
            with torch.no_grad():
                x = layer.observe(layer.module, args, kwargs, output)
        if x is None:
            return None
        if isinstance(x, Moments):
            return _fitting(layer, x)
        if not isinstance(x, Tensor):
            raise TypeError(f"expected observe of layer {layer.name!r} to return a tensor, got {type(x).__name__}")
        if is_sharded(x):
            x = gathered(x)
        sequences = x.size(0) if x.is_nested else 0
        if x.is_nested or x.layout is not torch.strided:
            x = x.detach()
            x = torch.cat(x.unbind()) if x.is_nested else x.to_dense()
        has_positions = layer.taps > 0 and isinstance(output, Tensor)
        if x.numel() == 0 or (has_positions and output.numel() == 0):
            return None
        axis = layer.channel_axis(x)
        if layer.one_hot:
            samples = sequences or (x.shape[0] if x.dim() else 1)
            return Moments(x.numel(), samples, x.numel(), *_frequencies(layer, x))
        if x.dim() <= layer.taps or x.shape[axis] != layer.inputs:
            raise ValueError(
                f"expected the input of layer {layer.name!r} ({type(layer.module).__name__}) to have "
                f"{layer.inputs} numbers along axis {axis}, got shape {tuple(x.shape)}; let its adapter say "
                "observe= or transposed="
            )
        count = x.numel() // x.shape[axis]
        rows = count
        if has_positions:  # the module may go on from the layer's output, as by gates that halve its channels
            rows = output.numel() // (output.shape[axis] if output.dim() == x.dim() else layer.units * layer.groups)
        samples = sequences or (samples_of(layer.module, x) if axis > 0 else 1)
        if self.ghost is not None and axis > 0:
            x = self._draw(x if layer.taps else x.flatten(0, -2), self.ghost)
        if self.taps and has_positions and layer.convolution and not meets_all(layer):
            seen = count if layer.transposed else rows  # how much they weigh beside other calls': patches
            found = patch_moments(layer, x, output.shape[-layer.taps :])
            return Moments(seen, samples, rows, *(moment.flatten() for moment in found))
        mean, variance = self._channel_moments(x, layer.channel_axis(x))
        if self.taps and layer.kernel_size > 1:  # no convolution: which positions its taps meet is not known
            mean, variance = (moment.repeat_interleave(layer.kernel_size) for moment in (mean, variance))
        return Moments(count, samples, rows, mean, variance)

    def deferred(self, args: tuple[Any, ...], output: Tensor) -> Deferred | None:
        """A place for the moments of a matrix that a linear layer's output is made of; None if it cannot wait.

        Where hooks pack saved tensors away (activation checkpointing), and where the product is of a cast
        (autocast), autograd does not keep it.
        """
        if not args or self.ghost is not None or not is_matrix(x := args[0]):
            return None
        if output.dtype is not x.dtype or packs_saved_tensors():
            return None
        deferred = Deferred(x)
        self.waiting.append(weakref.ref(deferred))
        if len(self.waiting) > _MANY:  # passes that nobody goes back through
            self.waiting = [ref for ref in self.waiting if ref() is not None]
        return deferred

    def settle(self) -> None:
        """Takes all moments that have been put off, in one go: a call of a kernel each, and one check for all."""
        there = [(d, d.x) for ref in self.waiting if (d := ref()) is not None and d.x is not None]
        self.waiting.clear()
        own = {id(x): x for _, x in there}  # several layers may be applied to the same
        found = dict(zip(own, moments_of_matrices(list(own.values())), strict=True))
        for deferred, x in there:
            rows = len(x)
            deferred.moments, deferred.x = Moments(rows, rows, rows, *found[id(x)]), None

    @torch.no_grad()
    def _draw(self, x: Tensor, n: int) -> Tensor:
        """Some rows at random; evenly spaced ones in a compiled pass, where a generator would break the graph."""
        if x.shape[0] <= n:
            return x
        if torch.compiler.is_compiling():
            return x[:: x.shape[0] // n][:n]
        self.seed += 1
        drawn = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(self.seed))[:n]
        return x[drawn.to(x.device, non_blocking=True)]

    def _channel_moments(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return channel_moments(x, axis)
        seen = self.seen.get(id(x))
        if seen is None or seen[0]() is not x or seen[1:3] != (x._version, axis):
            seen = weakref.ref(x), x._version, axis, channel_moments(x, axis)
            self.seen[id(x)] = seen
        return seen[3]


def samples_of(module: Any, x: Tensor) -> int:
    """How many samples a batch holds: along its first axis, the second where a module says batch_first=False.

    Example:
        >>> samples_of(torch.nn.GRU(3, 2), torch.zeros(5, 4, 3))
        4
    """
    return x.shape[0 if x.dim() < 3 or getattr(module, "batch_first", True) else 1]


def packs_saved_tensors() -> bool:
    """Do hooks pack away what autograd saves now, as activation checkpointing does? Unpacking may compute it again.

    Example:
        >>> packs_saved_tensors()
        False
        >>> with torch.autograd.graph.save_on_cpu():
        ...     packs_saved_tensors()
        True
    """
    if _TOP is not None:
        return _TOP(False) is not None
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("never seen"):  # raises where there are some
            return False
    except RuntimeError:
        return True


def _fitting(layer: Layer, moments: Moments) -> Moments:
    """Moments that an adapter gives, if they are of the layer's inputs."""
    shapes = tuple(moments.mean.shape), tuple(moments.variance.shape)
    if shapes[0] != shapes[1] or shapes[0] not in ((layer.inputs,), (layer.inputs * layer.kernel_size,)):
        raise ValueError(
            f"expected moments of {layer.inputs} numbers for layer {layer.name!r}, one per input, got mean "
            f"{shapes[0]} and variance {shapes[1]}; let its adapter's observe= give those of the whole input"
        )
    return moments


def _frequencies(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean p and variance p (1 - p) of one-hot inputs; a padding index is the zero input."""
    weight = layer.module.weight
    p = torch.zeros(layer.inputs, dtype=torch.promote_types(weight.dtype, torch.float32), device=x.device)
    p.index_add_(0, x.flatten().long(), p.new_ones(()).expand(x.numel()))
    padding = getattr(layer.module, "padding_idx", None)
    if padding is not None:
        p[padding] = 0
    p /= x.numel()
    return p, p * (1 - p)
