"""One pass of a model over its data that leaves everything as it was found."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradcond.curvature.substitutes import Substituted, needs_substitutes


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel or DistributedDataParallel."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, parallel):
            model = model.module
        else:
            return model


def _is_tensor(thing: Any) -> bool:
    return isinstance(thing, Tensor)


def _can_move(thing: Any) -> bool:
    """Tensors, and objects that move their own: packed sequences, tokenized text, graphs."""
    return hasattr(thing, "to")


def map_tensors(tree: Any, function: Callable[[Any], Any], leaf: Callable[[Any], bool] = _is_tensor) -> Any:
    """The same nest of lists, tuples and dicts with the function applied to each tensor, or other leaf."""
    if leaf(tree):
        return function(tree)
    if isinstance(tree, Mapping):
        mapped = {key: map_tensors(value, function, leaf) for key, value in tree.items()}
        if isinstance(tree, dict) and type(tree) is not dict:  # a dict with attributes (model outputs)
            result = copy.copy(tree)
            for key, value in mapped.items():
                result[key] = value
            return result
        return mapped
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(part, function, leaf) for part in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(part, function, leaf) for part in tree)
    return tree


def tensors_in(tree: Any) -> list[Tensor]:
    """Those that map_tensors goes through, in its order."""
    found: list[Tensor] = []

    def take(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_tensors(tree, take)
    return found


def batches(data: Iterable[Any], device: torch.device, pairs: bool) -> Iterator[Any]:
    """The batches of the data, on the device; as pairs (input, target) where asked for."""
    for index, batch in enumerate(data):
        if pairs and (not isinstance(batch, list | tuple) or len(batch) != 2):
            length = f" of length {len(batch)}" if isinstance(batch, list | tuple) else ""
            raise ValueError(
                f"expected batches (input, target), got {type(batch).__name__}{length} as batch {index}; wrap a "
                "loss that calls the model itself: ModelLoss(lambda model, batch: ...)"
            )
        yield map_tensors(batch, lambda thing: thing.to(device), _can_move)


def num_batches(data: Iterable[Any]) -> int | None:
    """The length of the data, None where it is not known (a loader of an iterable data set has none)."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:
        return None


class _Whole(nn.Module):
    """A model as a submodule, so that functional_call reaches whatever a function does with it."""

    def __init__(self, model: nn.Module, beside: Sequence[nn.Module]) -> None:
        super().__init__()
        self.model, self.beside = model, nn.ModuleList(beside)

    def forward(self, function: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        return function(self.model, batch)


def call(
    function: Callable[[nn.Module, Any], Any],
    model: nn.Module,
    batch: Any,
    parameters: Mapping[str, Tensor],
    beside: Sequence[nn.Module] = (),
) -> Any:
    """``function(model, batch)`` with other parameters in place; batch and buffers, also those beside, stay."""
    # each call gets its own copies, so running statistics move there, and what is written to an input is
    batch = map_tensors(batch, lambda t: t.detach().clone() if isinstance(t, Tensor) else t, _can_move)
    others = {id(buffer): buffer.clone() for module in (model, *beside) for buffer in module.buffers()}
    if parameters:
        others |= {id(p): parameters[name] for name, p in model.named_parameters() if name in parameters}
    if not others:
        return function(model, batch)
    whole = _Whole(model, beside)
    # each place once: functional_call's own search for tied ones takes a shared module for two, and breaks it
    tensors = {
        f"{name}.{key}": others[id(tensor)]
        for name, module in whole.named_modules()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if id(tensor) in others
    }
    return torch.func.functional_call(whole, tensors, (function, batch), tie_weights=False)


# how a switch stands, what sets it, and how it must stand: the fused attention kernels have no second derivative
SWITCHES: tuple[tuple[Callable[[], bool], Callable[[bool], None], bool], ...] = (
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp, True),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, False),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp, False),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp, False),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False),
)


@contextmanager
def left_as_found(
    model: nn.Module, parameters: Iterable[Tensor], data: Any, seed: int, only_torch: bool = False
) -> Iterator[None]:
    """Second derivatives work inside; random states and switches are put back afterwards.

    ``only_torch`` is for what is known to draw nothing from Python's and NumPy's generators.
    """
    modules = list(model.modules())
    with torch.inference_mode(False), torch.enable_grad(), _switched(modules), _without_hooks(modules, parameters):
        with _seeded(data, seed, only_torch), _renormalized_back(modules):
            yield


@contextmanager
def _switched(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Every switch as second derivatives need it."""
    dynamo = "torch._dynamo" in sys.modules
    # cuDNN's recurrent kernels have none
    recurrent = torch.backends.cudnn.is_available() and any(isinstance(m, nn.RNNBase) for m in modules)
    substituted = any(map(needs_substitutes, modules))
    before = [get() for get, _, _ in SWITCHES]
    try:
        for _, put, wanted in SWITCHES:
            put(wanted)
        with (
            torch.compiler.set_stance("force_eager") if dynamo else nullcontext(),  # compiled parts as written
            torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext(),
            Substituted() if substituted else nullcontext(),
        ):
            yield
    finally:
        for (_, put, _), found in zip(SWITCHES, before, strict=True):
            put(found)


@contextmanager
def _without_hooks(modules: Sequence[nn.Module], parameters: Iterable[Tensor]) -> Iterator[None]:
    """A gradient hook on a parameter or module changes what is learned, not the loss whose curvature we want."""
    hooks = [(p, p._backward_hooks) for p in parameters if p._backward_hooks is not None]
    tables = [table for m in modules for table in (m._backward_hooks, m._backward_pre_hooks) if table]
    contents = [dict(table) for table in tables]
    try:
        for p, _ in hooks:
            p._backward_hooks = None
        for table in tables:
            table.clear()
        yield
    finally:
        for p, found in hooks:
            p._backward_hooks = found
        for table, own in zip(tables, contents, strict=True):
            table.update(own)


@contextmanager
def _renormalized_back(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Embeddings with max_norm shorten their own rows in each pass."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    weights = [m.weight for m in modules if isinstance(m, kinds) and m.max_norm is not None]
    found = [w.detach().clone() for w in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for w, before in zip(weights, found, strict=True):
                if not torch.equal(w, before):
                    w.copy_(before)


class Draws:
    """The state of every global random generator, or of torch's alone, to be put back."""

    def __init__(self, only_torch: bool = False) -> None:
        self._torch = torch.get_rng_state()
        self._others = None if only_torch else (random.getstate(), np.random.get_state(legacy=False))
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        """Put the state back."""
        torch.set_rng_state(self._torch)
        for device, state in enumerate(self._cuda):
            torch.cuda.set_rng_state(state, device)
        if self._others is not None:
            random.setstate(self._others[0])
            np.random.set_state(_listed(self._others[1]))  # lists are taken back ten times as fast as arrays

    def only_torch_since(self) -> bool:
        """Whether Python's and NumPy's generators are where they were."""
        assert self._others is not None
        same = random.getstate() == self._others[0]
        return same and _listed(np.random.get_state(legacy=False)) == _listed(self._others[1])


def _listed(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _listed(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray) else state


@contextmanager
def _seeded(data: Any, seed: int, only_torch: bool) -> Iterator[None]:
    """Every generator a pass may draw from starts at the seed, and is put back afterwards."""
    sampler, of_batches = (getattr(data, name, None) for name in ("sampler", "batch_sampler"))
    owners = (data, sampler, of_batches, getattr(of_batches, "sampler", None))
    generators = {
        id(g): g for g in (getattr(o, "generator", None) for o in owners) if isinstance(g, torch.Generator)
    }
    states, draws = [(g, g.get_state()) for g in generators.values()], Draws(only_torch)
    try:
        torch.default_generator.manual_seed(seed)
        if draws._cuda:
            torch.cuda.manual_seed_all(seed)
        for generator, _ in states:
            generator.manual_seed(seed)
        if not only_torch:
            random.seed(seed)
            np.random.seed(seed)
        yield
    finally:
        draws.restore()
        for generator, state in states:
            generator.set_state(state)
