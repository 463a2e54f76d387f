"""One pass of a model over its data that leaves everything as it was found."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


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


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of lists, tuples and dicts with the function applied to each tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        mapped = {key: map_tensors(value, function) for key, value in tree.items()}
        if isinstance(tree, dict) and type(tree) is not dict:  # a dict with attributes (model outputs)
            result = copy.copy(tree)
            for key, value in mapped.items():
                result[key] = value
            return result
        return mapped
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(part, function) for part in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(part, function) for part in tree)
    return tree


def batches(data: Iterable[Any], device: torch.device) -> Iterator[tuple[Any, Any]]:
    """The pairs (input, target) of the data, on the device."""
    for index, batch in enumerate(data):
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            length = f" of length {len(batch)}" if isinstance(batch, list | tuple) else ""
            raise ValueError(
                f"expected batches (input, target), got {type(batch).__name__}{length} as batch {index}; "
                "wrap the data or the model so that the model takes one input and loss_fn one target"
            )
        input, target = map_tensors(tuple(batch), lambda t: t.to(device))
        yield input, target


def forward(model: nn.Module, input: Any) -> Any:
    """The model's output with its graph; a mapping is passed as keyword arguments."""
    # each batch gets its own copy of the buffers, so running statistics and the like move in the copy
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    args, kwargs = ((), dict(input)) if isinstance(input, Mapping) else ((input,), {})
    return torch.func.functional_call(model, buffers, args, kwargs) if buffers else model(*args, **kwargs)


@contextmanager
def left_as_found(model: nn.Module, data: Any, seed: int) -> Iterator[None]:
    """Second derivatives work inside; random states and switches are put back afterwards."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # the fused attention kernels have no second derivative, cuDNN's recurrent ones neither
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules:  # compiled parts run as they were written
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_seeded(data, seed))
        # a gradient hook on a parameter changes what is learned, not the loss whose curvature we want
        for p in model.parameters():
            stack.callback(setattr, p, "_backward_hooks", p._backward_hooks)
            p._backward_hooks = None
        yield


@contextmanager
def _seeded(data: Any, seed: int) -> Iterator[None]:
    """Every generator a pass may draw from starts at the seed, and is put back afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    owners = (data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None))
    generators = {
        id(g): g for g in (getattr(o, "generator", None) for o in owners) if isinstance(g, torch.Generator)
    }
    states = [(g, g.get_state()) for g in generators.values()]
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            torch.default_generator.manual_seed(seed)
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            for generator, _ in states:
                generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for generator, state in states:
                generator.set_state(state)
