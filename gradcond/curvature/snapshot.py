"""What a kept graph was built from, so that no change goes unseen."""

from __future__ import annotations

import ctypes
import functools
import operator
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class Snapshot:
    """A copy of the contents of models, losses and batches: tensors by value, settings, the form of nests.

    By value, as ``p.data.mul_(2)`` and NumPy views move no version counter. Of a module also its mode, its
    settings, hooks and ``forward``; of a function what it closes over, its defaults, the globals it names and
    what it names of a module among them. Anything else counts as itself and its own settings.
    """

    def __init__(self, *things: Any) -> None:
        self._walk = _Walk(things)
        self._own = self._walk.tensors  # what the graph is made of, even when equal ones have taken their place
        self._copies = [_Copy(t) for t in self._own]

    def holds(self, *things: Any) -> bool:
        """Whether nothing has changed since."""
        walk = self._walk
        if not walk.still(things):  # other objects, of equal contents perhaps
            walk = _Walk(things)
            if len(walk.tensors) != len(self._copies) or not _alike(walk.plain, self._walk.plain):
                return False
        for tensors in (self._own,) if walk.tensors is self._own else (self._own, walk.tensors):
            if not all(map(_Copy.holds, self._copies, tensors)):
                return False
        self._walk = walk
        return True


class _Copy:
    """The contents of a tensor."""

    def __init__(self, t: Tensor) -> None:
        self.kind = _kind(t)
        # bytes are compared six times as fast as numbers by torch.equal, and at seven times the speed of a digest
        self.bytes = t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter) and _is_plain(t)
        self.contents: Any = bytearray(_memory(t)) if self.bytes else [part.clone() for part in _numbers(t)]

    def holds(self, t: Tensor) -> bool:
        """Whether the tensor has these contents."""
        if _kind(t) != self.kind:
            return False
        if not self.bytes:
            return all(map(torch.equal, _numbers(t), self.contents))
        return _is_plain(t) and bool(self.contents == _memory(t))


def _is_plain(t: Tensor) -> bool:
    """Whether its numbers lie in memory one after the other; storages can have been resized."""
    if t.layout != torch.strided or not t.is_contiguous() or t.is_neg() or t.is_conj():
        return False
    return t.untyped_storage().nbytes() >= (t.storage_offset() + t.numel()) * t.element_size()


def _memory(t: Tensor) -> Any:
    # not by NumPy, whose views forbid for ever that the storage is resized
    return (ctypes.c_char * (t.numel() * t.element_size())).from_address(t.data_ptr())


def _numbers(t: Tensor) -> list[Tensor]:
    """What can be compared: the tensor, or indices and values of a sparse one."""
    if t.layout not in _SPARSE:
        return [t.detach()]
    listed = t.detach().to_sparse(layout=torch.sparse_coo)
    return [listed._indices(), listed._values()]


_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def _kind(t: Tensor) -> tuple[Any, ...]:
    # autograd refuses a graph whose tensors were written to, even with the same numbers
    version = None if t.is_inference() else t._version
    return type(t), version, t.requires_grad, t.dtype, t.device, t.layout, t.shape


class _Walk:
    """All that things are made of: settings, tensors, and what held them, to see at a glance that it still does."""

    def __init__(self, things: tuple[Any, ...]) -> None:
        self.things = things
        self.plain: list[Any] = []  # settings, in order, and objects as _Same
        self.tensors: list[Tensor] = []
        # what can be changed: objects and the tables of their attributes, other tables, lists, functions
        self._objects: list[Any] = []
        self._attributes: list[dict[str, Any]] = []
        self._tables: list[Any] = []
        self._lists: list[list[Any]] = []
        self._functions: list[types.FunctionType] = []
        self._steady = True
        self._seen: set[int] = set()
        for thing in things:
            self._visit(thing, 1)
        self._sizes, self._parts = self._held()
        self._empty = [part for part in self._parts if type(part) in _TABLES and not part]

    def still(self, things: tuple[Any, ...]) -> bool:
        """Whether these are the same things, made of the same objects; tensors may have other contents."""
        return (
            self._steady
            and len(things) == len(self.things)
            and all(map(_same, things, self.things))
            and not any(self._empty)
            and all(map(operator.is_, map(vars, self._objects), self._attributes))
            and self._holds(*self._held())
        )

    def _held(self) -> tuple[list[int], list[Any]]:
        """The objects that can be exchanged in all that is watched, and how many there are in each."""
        sizes, parts = [*map(len, self._attributes), *map(len, self._tables), *map(len, self._lists)], []
        for table in (*self._attributes, *self._tables):
            parts += table
            parts += table.values()
        for items in self._lists:
            parts += items
        for function in self._functions:
            own = list(_of_function(function))
            parts += own
            sizes.append(len(own))
        return sizes, parts

    def _holds(self, sizes: list[int], parts: list[Any]) -> bool:
        return sizes == self._sizes and all(map(operator.is_, parts, self._parts))

    def _visit(self, thing: Any, depth: int) -> None:
        if isinstance(thing, (*PLAIN, _Same)):
            self.plain.append(thing)
        elif id(thing) in self._seen:
            self.plain.append(_Same(thing))
        elif isinstance(thing, Tensor):
            self._seen.add(id(thing))
            self.plain.append(Tensor)
            self.tensors.append(thing)
        else:
            self._seen.add(id(thing))
            self.plain.append(type(thing) if isinstance(thing, _NESTS) else _Same(thing))
            self._watch(thing, depth)
            below = depth if isinstance(thing, _NESTS) else depth + 1
            below = 2 if isinstance(thing, nn.Module) else below  # the settings of all modules count alike
            for part in _parts(thing, depth):
                self._visit(part, below)

    def _watch(self, thing: Any, depth: int) -> None:
        foreign = isinstance(thing, Mapping) and type(thing) not in _TABLES
        if foreign or isinstance(thing, np.ndarray | torch.jit.ScriptModule):
            self._steady = False
        elif type(thing) in _TABLES:
            self._tables.append(thing)
        elif isinstance(thing, list):
            self._lists.append(thing)
        elif _is_own(thing):
            self._functions.append(thing)
        elif _has_settings(thing, depth):
            if hasattr(thing, "__dict__"):
                self._objects.append(thing)
                self._attributes.append(vars(thing))
            self._steady = self._steady and not _slots(thing)


class _Same:
    """Equal to itself alone; holds the object, so that its place is not given to another."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing


_UNUSED = ("_backward_hooks", "_backward_pre_hooks")
_NESTS = (list, tuple, Mapping, np.ndarray, types.MethodType)
_TABLES = (dict, OrderedDict)


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, PLAIN) and type(a) is type(b) and bool(a == b))


def _alike(some: list[Any], others: list[Any]) -> bool:
    pairs = zip(some, others, strict=False)
    return len(some) == len(others) and all(type(a) is type(b) and (a is b or a == b) for a, b in pairs)


def _is_own(thing: Any) -> bool:
    """A function that is not torch's; one made by exec, as torch.fx does, may be of no module."""
    return isinstance(thing, types.FunctionType) and not (thing.__module__ or "").startswith("torch.")


def _has_settings(thing: Any, depth: int) -> bool:
    if isinstance(thing, (*_NESTS, types.FunctionType, functools.partial, type, types.ModuleType)):
        return False
    return isinstance(thing, nn.Module) or (depth < 4 and (hasattr(thing, "__dict__") or bool(_slots(thing))))


def _slots(thing: Any) -> list[str]:
    """Attributes that stand beside the table of the others, or in its place."""
    named = [vars(kind).get("__slots__", ()) for kind in type(thing).__mro__]
    return [name for names in named for name in ([names] if isinstance(names, str) else names)]


def _parts(thing: Any, depth: int) -> Iterator[Any]:
    if isinstance(thing, Mapping):
        for key, value in thing.items():
            yield key if isinstance(key, PLAIN) else _Same(key)
            yield value
    elif isinstance(thing, list | tuple):
        yield len(thing)
        yield from thing
    elif isinstance(thing, np.ndarray):
        yield thing.shape
        if thing.dtype == object:
            yield from thing.flat
        else:
            yield torch.from_numpy(thing.copy()) if thing.dtype.kind in "fiub" else thing.tobytes()
    elif isinstance(thing, functools.partial):
        yield from (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, types.MethodType):
        yield from (thing.__func__, thing.__self__)
    elif isinstance(thing, types.FunctionType):
        if _is_own(thing):
            yield from _of_function(thing)
    elif isinstance(thing, torch.jit.ScriptModule):
        yield from (m.training for m in thing.modules())
        yield from (*thing.parameters(), *thing.buffers())
    elif _has_settings(thing, depth):
        if isinstance(thing, nn.Module) and _is_own(type(thing).forward):
            yield type(thing).forward
        yield from (getattr(thing, name, None) for name in _slots(thing))
        for name, value in getattr(thing, "__dict__", {}).items():
            # most of a module is empty tables of hooks: left out for speed; those of gradients are not run
            if name not in _UNUSED and value is not None and not (isinstance(value, dict) and not value):
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
    names = list(_names(function.__code__))
    for name in names:
        value = function.__globals__.get(name)
        yield value
        if isinstance(value, types.ModuleType):
            yield from map(vars(value).get, names)


def _names(code: types.CodeType) -> Iterator[str]:
    """What the code reads by name, with that of the functions defined inside."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)
