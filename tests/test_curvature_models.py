"""Models that other tools crash on, by both product methods, against the dense double-backward matrix."""

import gc
import os
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_curvature import assert_same_operator, ggn_of, hessian_of, trainable
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from gradcond.curvature import GGN, EmpiricalFisher, Hessian, ModelLoss, MonteCarloFisher


class Lambda(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def mlp(*middle, out=3):
    return nn.Sequential(nn.Linear(4, 4), *middle, nn.Tanh(), nn.Linear(4, out))


def fused_attention(m, x):
    q, k, v = m.qkv(x).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4)
    return m.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).flatten(1))


def scaled(m, x):
    return m.inner(x) + m.shift  # the shift is linear in the output


def with_parameter(module, **parameters):
    for name, value in parameters.items():
        module.register_parameter(name, nn.Parameter(value))
    return module


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


def frozen():
    model = mlp(nn.Tanh(), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    return model


def image_norm(norm):
    return nn.Sequential(nn.Conv2d(2, 4, 2), norm, nn.Softplus(), nn.Flatten(), nn.Linear(16, 3))


def recurrent(kind):
    return Lambda(lambda m, x: m.out(m.cell(x)[0][:, -1]), cell=kind(4, 3, batch_first=True), out=nn.Linear(3, 3))


def transformer():
    return nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(12, 3)
    )


def attention():
    module = nn.MultiheadAttention(4, 2, batch_first=True)
    return Lambda(
        lambda m, x: m.out(m.inner(x, x, x, need_weights=False)[0].mean(1)), inner=module, out=nn.Linear(4, 3)
    )


def checkpointed():
    return Lambda(lambda m, x: checkpoint(m.inner, x, use_reentrant=False), inner=mlp())


NORMS = {
    "layer norm": (lambda: mlp(nn.LayerNorm(4)), (4,)),
    "instance norm": (lambda: image_norm(nn.InstanceNorm2d(4, affine=True)), (2, 3, 3)),
    "group norm": (lambda: image_norm(nn.GroupNorm(2, 4)), (2, 3, 3)),
    "batch norm, train": (lambda: mlp(nn.BatchNorm1d(4)), (4,)),
    "batch norm, eval": (lambda: mlp(nn.BatchNorm1d(4)).eval(), (4,)),
}
MODELS = {
    **NORMS,
    "fused attention": (lambda: Lambda(fused_attention, qkv=nn.Linear(4, 12), out=nn.Linear(12, 3)), (3, 4)),
    "encoder, train": (transformer, (3, 4)),
    "encoder, eval": (lambda: transformer().eval(), (3, 4)),
    "multi-head attention": (attention, (3, 4)),
    "lstm": (lambda: recurrent(nn.LSTM), (3, 4)),
    "gru": (lambda: recurrent(nn.GRU), (3, 4)),
    "unused": (lambda: with_parameter(mlp(), nothing=torch.ones(3)), (4,)),
    "tied": (tied, (4,)),
    "frozen": (frozen, (4,)),
    "linear in the loss": (lambda: with_parameter(Lambda(scaled, inner=mlp()), shift=torch.zeros(3)), (4,)),
    "dropout off": (lambda: mlp(nn.Dropout(0.5)).eval(), (4,)),
    "compiled": (lambda: torch.compile(mlp(), backend="eager"), (4,)),
    "checkpointed": (checkpointed, (4,)),
    "data parallel": (lambda: nn.DataParallel(mlp()), (4,)),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 3)),
        (4,),
    ),
}


def dense(kind, model, output, loss):
    """The matrix of loss(output()), with the attention that has second derivatives; buffers are put back."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH):
        if kind is Hessian:
            matrix = hessian_of(lambda: loss(output()), trainable(model))
        else:
            matrix = ggn_of(output(), loss, trainable(model))
    torch.backends.mha.set_fastpath_enabled(True)
    for name, b in model.named_buffers():
        b.copy_(buffers[name])
    return matrix


@pytest.mark.parametrize("method", ["double_backward", "forward_over_reverse"])
@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, kind, method):
    build, shape = MODELS[name]
    model, x, y = build(), torch.randn(5, *shape), torch.randint(0, 3, (5,))
    exact = dense(kind, model, lambda: model(x), lambda z: F.cross_entropy(z, y))
    assert_same_operator(kind(model, nn.CrossEntropyLoss(), [(x, y)], method=method), exact)
