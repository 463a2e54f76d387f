"""nn.Embedding as a bias-free linear layer on one-hot inputs."""

from __future__ import annotations

from torch import nn

from gradcond.layers import Layer, register_layer

__all__: list[str] = []


def _layer(module: nn.Embedding) -> Layer | str:
    if module.sparse:
        return "its gradients are sparse"
    if type(module).forward is not nn.Embedding.forward:  # of positions, say: it may be called with anything
        return f"{type(module).__name__} has a forward of its own; register_layer shows what it looks up"
    return Layer("", module, transposed=True, one_hot=True)


register_layer(nn.Embedding, _layer)
