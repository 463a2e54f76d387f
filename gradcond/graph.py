"""torch_geometric's GCNConv: linear in the features that its normalized adjacency has aggregated."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from gradcond.layers import Layer, register_layer

__all__: list[str] = []


def _layer(module: Any) -> Layer:
    return Layer("", module, weight="lin.weight", observe=aggregated)


def aggregated(module: Any, args: Any, kwargs: Any, output: Any) -> Tensor:
    """A x, where the module gives A x W^T + b: its own forward pass with W = I and no bias."""
    plain = copy.copy(module)  # it shares the cached A
    plain._modules = {**module._modules, "lin": nn.Identity()}
    plain._parameters = {**module._parameters, "bias": None}
    x: Tensor = type(module).forward(plain, *args, **kwargs)  # not __call__: its hooks have had their turn
    return x


register_layer("torch_geometric.nn.conv.gcn_conv.GCNConv", _layer)
