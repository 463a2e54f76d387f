"""Layers whose parameters are DTensors, as FSDP2 keeps them: shown as plain tensors, local rows or all of them.

A row of a gradient is an output unit, and every method here acts on rows. Sharded by FSDP2, Linear and Conv keep
whole rows on each rank, so each conditions its own without a word to the others. Where rows are not local
(transposed and grouped convolutions, other placements, methods that look across output units) tensors are
gathered, changed and cut up again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradcond.layers import Layer

__all__ = ["gathered", "local", "local_state", "moving", "opened", "placed", "rows_are_local", "shown"]


_PLAIN = Tensor, torch.nn.Parameter


def is_sharded(tensor: Any) -> bool:
    """Is it a DTensor? Asked by its attribute: importing DTensor takes half a second."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Any:
    """This rank's part of a tensor, of which it is a view; a plain tensor, or None, is its own part."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def rows_are_local(layer: Layer) -> bool:
    """Does each rank hold whole rows, of the weight and of the bias alike?

    Example:
        >>> rows_are_local(Layer("fc", torch.nn.Linear(3, 2)))
        True
    """
    weights, biases = layer.weights, layer.biases
    if not any(is_sharded(p) for p in weights + biases):
        return True
    if layer.transposed or layer.groups > 1 or layer.span is not None:
        return False
    placements = {tuple(p.placements) if is_sharded(p) else None for p in weights + biases}
    alike = placements.pop()
    return not placements and alike is not None and all(p.is_replicate() or p.is_shard(0) for p in alike)


class _Plain:
    """Looks a layer's parameters up as plain tensors, gathered when somebody looks at them."""

    def __init__(self, layer: Layer, whole: bool) -> None:
        self.layer, self.whole = layer, whole
        self.seen: dict[str, Tensor] = {}

    def __call__(self, key: str) -> Tensor:
        if key not in self.seen:
            parameter = self.layer.lookup(key)
            self.seen[key] = gathered(parameter) if self.whole else local(parameter)
        return self.seen[key]


def shown(layer: Layer, *, whole: bool = True) -> Layer:
    """The layer with plain parameters: all of its rows, for which ranks meet, or this rank's own, to be changed.

    Example:
        >>> layer = Layer("fc", torch.nn.Linear(3, 2))
        >>> shown(layer) is layer  # nothing to do on one process
        True
    """
    if not any(is_sharded(p) for p in layer.weights + layer.biases):
        return layer
    other = copy.copy(layer)
    other.lookup = _Plain(layer, whole)
    if not whole:
        other.units = other.weights[0].shape[0]
    return other


@contextmanager
def moving(layer: Layer, *, whole: bool) -> Iterator[Layer]:
    """The layer as `shown`, whose parameters are to be changed in place: all of them are put back afterwards."""
    view = shown(layer, whole=whole)
    yield view
    if view is not layer and whole:
        for key, tensor in view.lookup.seen.items():  # type: ignore[attr-defined]
            _put(tensor, layer.lookup(key))


@contextmanager
def opened(tensors: Sequence[Tensor], *, whole: bool) -> Iterator[list[Tensor]]:
    """Plain tensors to be changed in place: this rank's parts, or all of them, put back afterwards."""
    if not whole:
        yield [local(t) for t in tensors]
        return
    everything = [gathered(t) for t in tensors]
    yield everything
    for tensor, changed in zip(tensors, everything, strict=True):
        _put(changed, tensor)


def whole_sum(part: Tensor, where: tuple[Any, Any] | None) -> Tensor:
    """A sum over a sharded tensor from those over its parts, given its mesh and placements (None: it is plain)."""
    if where is None:
        return part
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = where
    kinds = [Replicate() if p.is_replicate() else Partial() for p in placements]
    whole: Tensor = DTensor.from_local(part, mesh, kinds, run_check=False).full_tensor()
    return whole


def local_state(layer: Layer, state: dict[str, Any]) -> dict[str, Any]:
    """A layer's state as this rank's rows see it.

    Statistics of the inputs, (inputs,), are the same on all ranks; what has more axes is per row, (1, units, ...).
    """
    weight = layer.weights[0]
    if not is_sharded(weight):
        return state
    per_row = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.dim() > 1}
    return {**state, **{k: local(placed(v[0], weight))[None] for k, v in per_row.items()}}


@torch.no_grad()
def gathered(tensor: Any) -> Any:
    """All of a tensor, for which ranks meet; a plain one as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def _put(whole: Tensor, tensor: Any) -> None:
    if is_sharded(tensor):
        local(tensor).copy_(local(placed(whole, tensor)))


@torch.no_grad()
def placed(whole: Tensor, like: Any) -> Any:
    """A tensor that all ranks hold, placed as another one is; without communication."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, like.placements)
