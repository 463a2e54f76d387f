"""nn.Embedding as a bias-free linear layer on one-hot inputs."""

from __future__ import annotations

from torch import nn

from gradcond.layers import Layer, register_layer

__all__: list[str] = []


def _layer(module: nn.Embedding) -> Layer | str:
    if module.sparse:
        return "its gradients are sparse"
    return Layer("", module, transposed=True, one_hot=True)


register_layer(nn.Embedding, _layer)
