"""Which part of a model or of its data is random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler

from gradcond.curvature.passes import tensors_in

Pass = Callable[[int], AbstractContextManager[Iterator[Any]]]  # seed -> the batches drawn under it


def culprit(model: nn.Module, data: Any, batches: Pass, run: Callable[[Any], Any]) -> str:
    """What differs between two passes under different seeds, in words, and what to do.

    Args:
        model: its leaf modules are watched on the first batch.
        data: what the batches come from.
        batches: ``with batches(seed) as drawn`` gives them, every random state set from the seed.
        run: the forward pass of one batch.
    """
    module = _random_module(model, batches, run)
    if module is not None:
        return module
    first, second = (_contents(batches, seed) for seed in (0, 1))
    if first != second:
        return _random_data(model, data)
    return "something random remains, perhaps in the loss: let it draw from torch's, NumPy's or Python's generator"


def _random_module(model: nn.Module, batches: Pass, run: Callable[[Any], Any]) -> str | None:
    """The first leaf module whose output differs though its input is the same."""
    calls: list[list[tuple[str, str, list[Tensor], list[Tensor]]]] = [[], []]
    names = {module: name for name, module in model.named_modules() if not any(module.children())}
    with batches(0) as drawn:
        batch = next(iter(drawn), None)
    if batch is None:  # of several processes, this one has no data
        return None
    for seed, seen in enumerate(calls):

        def watch(module: nn.Module, args: Any, kwargs: Any, output: Any, seen: Any = seen) -> None:
            seen.append((names[module], type(module).__name__, _tensors((args, kwargs)), _tensors(output)))

        with ExitStack() as stack:
            for module in names:
                handle = module.register_forward_hook(watch, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(batches(seed))
            run(batch)
    for (name, kind, *own), (_, _, *other) in zip(*calls, strict=False):
        same_input, same_output = (_equal(a, b) for a, b in zip(own, other, strict=True))
        if not same_input:
            return f"the input of {name!r} differs: something random before it, such as functional dropout"
        if not same_output and "Dropout" in kind:
            return f"dropout is active in {name!r} ({kind}): call model.eval() first"
        if not same_output:
            return f"{name!r} ({kind}) gives different outputs for the same input: call model.eval(), or mend it"
    return None


def _random_data(model: nn.Module, data: Any) -> str:
    if not isinstance(data, DataLoader) or isinstance(data.sampler, SequentialSampler):
        return "the data differ from pass to pass: turn augmentation off, or read them once with list(data)"
    if data.drop_last:
        return "the loader shuffles and leaves other samples out each time: use drop_last=False or shuffle=False"
    for name, module in model.named_modules():
        if module.training and "BatchNorm" in type(module).__name__:
            kind = type(module).__name__
            return f"{name!r} ({kind}) normalizes by batches that change: use shuffle=False, or model.eval()"
    return "the loader's samples differ from pass to pass: turn augmentation off, or use shuffle=False"


def _contents(batches: Pass, seed: int) -> list[list[float]]:
    with batches(seed) as drawn:
        return [[float(t.double().sum()) for t in _tensors(batch)] for batch in drawn]


def _tensors(tree: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors_in(tree)]


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
