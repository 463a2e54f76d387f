"""Operations of torch whose second derivative is missing or wrong, by others that have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode


def needs_substitutes(m: nn.Module) -> bool:
    """Whether the module runs such an operation."""
    if isinstance(m, nn.Embedding):
        return m.sparse or m.scale_grad_by_freq
    hooks = m._forward_pre_hooks.values()
    kinds = (nn.EmbeddingBag, nn.Hardsigmoid, _WeightNorm)
    return isinstance(m, kinds) or any(isinstance(hook, WeightNorm) for hook in hooks)


class Substituted(TorchFunctionMode):
    """Inside, such operations are computed by differentiable steps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return SUBSTITUTES.get(func, func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    result = F.relu6(input + 3) / 6
    return input.copy_(result) if inplace else result


def _embedding(input: Tensor, weight: Tensor, **options: Any) -> Tensor:
    # sparse gradients have no derivative, and those divided by counts are no gradients
    return F.embedding(input, weight, **{**options, "sparse": False, "scale_grad_by_freq": False})


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    *,
    offsets: Tensor | None,
    mode: str,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
    max_norm: float | None,
    norm_type: float,
    **_: Any,
) -> Tensor:
    if offsets is None:
        offsets = torch.arange(0, input.numel(), input.shape[1], device=input.device)
    starts, items = offsets[: len(offsets) - include_last_offset], input.reshape(-1)
    rows = F.embedding(items, weight, padding_idx, max_norm, norm_type)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    places = torch.arange(len(items), dtype=starts.dtype, device=starts.device)
    bags = torch.searchsorted(starts, places, right=True) - 1
    if padding_idx is not None:
        kept = items != padding_idx % len(weight)
        rows, bags = rows[kept], bags[kept]
    empty = rows.new_zeros(len(starts), rows.shape[1])
    if mode == "max":
        return empty.scatter_reduce(0, bags[:, None].expand_as(rows), rows, "amax", include_self=False)
    total = empty.index_add(0, bags, rows)
    return total if mode == "sum" else total / bags.bincount(minlength=len(starts)).clamp_min(1)[:, None]


SUBSTITUTES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    F.hardsigmoid: _hardsigmoid,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
}
