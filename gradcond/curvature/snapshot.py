"""What a kept graph was built from, so that no change goes unseen."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class Snapshot:
    """A copy of the contents of models, losses and batches: tensors by value, settings, the form of nests.

    By value, as ``p.data.mul_(2)`` and NumPy views move no version counter. Of a module also its mode, its
    settings and hooks; of a function what it closes over, its defaults and the globals it names. Anything else
    counts as itself and its own settings.
    """

    def __init__(self, *things: Any) -> None:
        leaves = list(_leaves(things))
        self._plain = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        self._tensors = [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]

    def holds(self, *things: Any) -> bool:
        """Whether nothing has changed since."""
        leaves = list(_leaves(things))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        plain = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        return (
            len(plain) == len(self._plain)
            and all(type(a) is type(b) and (a is b or a == b) for a, b in zip(plain, self._plain, strict=True))
            and len(tensors) == len(self._tensors)
            and all(map(_equal, tensors, self._tensors))
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a.detach(), b)


def _leaves(thing: Any, seen: set[int] | None = None, depth: int = 0) -> Iterator[Any]:
    seen = set() if seen is None else seen
    if isinstance(thing, PLAIN):
        yield thing
    elif id(thing) in seen:
        yield _Same(thing)
    elif isinstance(thing, Tensor):
        seen.add(id(thing))
        yield thing
        yield thing.requires_grad
    else:
        seen.add(id(thing))
        yield type(thing) if isinstance(thing, _NESTS) else _Same(thing)
        for part in _parts(thing, depth):
            yield from _leaves(part, seen, depth + 1)


class _Same:
    """Equal to itself alone; holds the object, so that its place is not given to another."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing


_NESTS = (list, tuple, Mapping, np.ndarray, types.MethodType)


def _parts(thing: Any, depth: int) -> Iterator[Any]:
    if isinstance(thing, Mapping):
        for key, value in thing.items():
            yield key if isinstance(key, PLAIN) else _Same(key)
            yield value
    elif isinstance(thing, list | tuple):
        yield len(thing)
        yield from thing
    elif isinstance(thing, np.ndarray) and thing.dtype != object:
        yield torch.from_numpy(thing.copy()) if thing.dtype.kind in "fiub" else thing.tobytes()
    elif isinstance(thing, functools.partial):
        yield from (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, types.MethodType):
        yield from (thing.__func__, thing.__self__)
    elif isinstance(thing, types.FunctionType):
        if not thing.__module__.startswith("torch."):
            yield from _of_function(thing)
    elif isinstance(thing, nn.Module) or (hasattr(thing, "__dict__") and depth < 4):
        if not isinstance(thing, type | types.ModuleType):
            for name, value in vars(thing).items():
                # most of a module is empty tables of hooks: left out for speed
                if value is not None and not (isinstance(value, dict) and not value):
                    yield name
                    yield value


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    yield function.__code__
    yield from (function.__defaults__, function.__kwdefaults__)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not yet assigned
            yield None
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, (Tensor, nn.Module, np.ndarray, types.FunctionType, list, dict, *PLAIN)):
            yield value
