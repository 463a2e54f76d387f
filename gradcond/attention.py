"""nn.MultiheadAttention: projections of query, key and value, and one of what the heads put out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradcond.inputs import packs_saved_tensors
from gradcond.layers import Layer, register_layer

__all__: list[str] = []


def _projections(module: nn.MultiheadAttention) -> list[Layer]:
    n, layers = module.embed_dim, []
    for i, name in enumerate(("query", "key", "value")):
        weight = "in_proj_weight" if module._qkv_same_embed_dim else f"{name[0]}_proj_weight"
        span = i * n, i * n + n
        layers.append(
            Layer(name, module, weight=weight, bias="in_proj_bias", observe=_argument(name, i), span=span)
        )
    out = Layer("out_proj", module, weight="out_proj.weight", bias="out_proj.bias", observe=heads_output)
    return [*layers, out]


def _argument(name: str, i: int) -> Callable[..., Tensor | None]:
    """Observes one of the three arguments; None where a subclass is called otherwise."""

    def argument(module: Any, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        x = args[i] if i < len(args) else kwargs.get(name)
        return _batched(module, x) if isinstance(x, Tensor) else None

    return argument


def heads_output(module: nn.MultiheadAttention, args: Any, kwargs: Any, output: Any) -> Tensor | None:
    """The output projection's input, which the module keeps to itself: the product has saved it for backward.

    None where saved tensors are packed away (activation checkpointing would compute the pass again), and where a
    subclass goes on from that product.
    """
    if torch.compiler.is_compiling() or packs_saved_tensors():
        return None
    node = output[0].grad_fn
    while node is not None and "mm" not in node.name().lower():  # views, a transposition, a cast
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)
    if node is None or _last_factor(node) is not module.out_proj.weight:
        return None
    x: Tensor = node._saved_mat1 if hasattr(node, "_saved_mat1") else node._saved_self
    whole = output[0].numel() == x.numel()  # a subclass may put out a part
    return _batched(module, x.view(output[0].shape)) if whole else x


def _batched(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """A sequence by itself as a batch of one."""
    return x.unsqueeze(0 if module.batch_first else 1) if x.dim() == 2 else x


def _last_factor(product: Any) -> Tensor | None:
    """The parameter that a product's last factor is a view or a cast of."""
    node = product.next_functions[-1][0]
    while node is not None and not hasattr(node, "variable"):
        node = next((parent for parent, _ in node.next_functions), None)
    return None if node is None else node.variable


register_layer(nn.MultiheadAttention, _projections)
