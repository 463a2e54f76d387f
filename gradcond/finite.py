"""Are gradients and inputs finite? Asked at every step, so cheaply."""

from __future__ import annotations

import cmath
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradcond.shards import local
from gradcond.statistics import Moments

flattened = torch._C._nn.flatten_dense_tensors  # one call, in place of one each and torch.cat

__all__ = ["entries", "not_finite", "passes", "total_of"]

_SMALL = 1024  # numbers: so few are cheaper to bring together than to sum up by themselves


def total_of(tensors: Iterable[Tensor], *, on_cpu: bool = False) -> complex:
    """The sum of all entries: not finite when one of them is not. It may overflow where they are finite.

    A sum is vectorized; the largest magnitude, which cannot overflow, takes a hundred times as long on a CPU.
    `on_cpu` says that they are all there, which then nobody asks.

    Example:
        >>> total_of([torch.ones(2), torch.tensor([float("inf")])])
        inf
    """
    parts = [t.sum() if t.numel() > _SMALL else t for t in tensors]
    if on_cpu or len({t.device for t in parts}) == 1:
        parts = [flattened(parts)] if parts else []
    total: complex = sum(t.sum().item() for t in parts)
    return total


def passes(tensors: Sequence[Tensor], check: bool | None) -> bool:
    """Is their sum finite, or not to be looked at? `check` None looks on the CPU, where nobody waits for it."""
    on_cpu = all(t.is_cpu for t in tensors)
    return not (on_cpu if check is None else check) or cmath.isfinite(total_of(tensors, on_cpu=on_cpu))


def entries(grad: Any) -> Any:
    """The numbers of a gradient that are on this rank; of a sparse one those that it holds."""
    return grad._values() if grad.is_sparse else local(grad)


def not_finite(model: nn.Module, held: Sequence[Tensor], moments: Mapping[str, Moments | None]) -> list[str]:
    """What of these parameters' gradients and layers' inputs is not finite, for a message."""
    names = {id(p): name for name, p in model.named_parameters()}
    whose = (names.get(id(p), "a parameter that is not the model's") for p in held)
    looked_at = [(f"the gradient of {name}", entries(p.grad)) for name, p in zip(whose, held, strict=True)]
    looked_at += [(f"the input of {name}", m.variance) for name, m in moments.items() if m is not None]
    return [name for name, tensor in looked_at if not bool(tensor.isfinite().all())]
