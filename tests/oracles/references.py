"""What the peers and we are held against: dense double-backward matrices, and matrices of known spectrum."""

import functools

import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


def as_function(model, x):
    """The outputs as a function of the trainable parameters as one vector, and that vector."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def outputs(v):
        parts = v.split([p.numel() for p in named.values()])
        replaced = {name: part.view_as(p) for part, (name, p) in zip(parts, named.items(), strict=True)}
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(model, {**replaced, **buffers}, (x,))

    return outputs, torch.cat([p.detach().reshape(-1) for p in named.values()])


def dense_hessian(model, loss_fn, x, y):
    outputs, v = as_function(model, x)
    return hessian(lambda v: loss_fn(outputs(v), y), v)


def dense_ggn(model, loss_fn, x, y):
    outputs, v = as_function(model, x)
    J, z = jacobian(lambda v: outputs(v).reshape(-1), v), outputs(v).detach()
    return J.mT @ hessian(lambda z: loss_fn(z, y), z).reshape(len(J), len(J)) @ J


def dense_fisher(model, loss_fn, x, y):
    """The mean of g g^T over the samples, loss_fn being a mean over them."""
    outputs, v = as_function(model, x)
    G = jacobian(lambda v: functools.partial(loss_fn, reduction="none")(outputs(v), y), v)
    return G.mT @ G / len(x)


DENSE = {"Hessian": dense_hessian, "GGN": dense_ggn}


def error(matrix, dense):
    """The largest entry of the difference, in units of the largest |eigenvalue|."""
    return float((matrix - dense).detach().abs().max() / torch.linalg.eigvalsh(dense).abs().max())


def assert_same(matrix, dense, relative=1e-10):
    assert matrix.shape == dense.shape
    assert error(matrix, dense) <= relative, f"off by {error(matrix, dense):.1e} of the largest eigenvalue"


def split(x, y, sizes):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def symmetric(values, dtype=torch.float64):
    """A dense matrix with these eigenvalues."""
    values = torch.as_tensor(values, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))[0]
    A = (Q * values) @ Q.mT
    return ((A + A.mT) / 2).to(dtype)


def mlp(*middle):
    return nn.Sequential(nn.Linear(4, 5), *middle, nn.Tanh(), nn.Linear(5, 3))


class Attention(nn.Module):
    """Four tokens of width four, two heads, by torch's kernel."""

    def __init__(self):
        super().__init__()
        self.query, self.value, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(16, 3)

    def forward(self, x):
        q, v = (layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.query, self.value))
        mixed = nn.functional.scaled_dot_product_attention(q, q, v)
        return self.out(mixed.transpose(1, 2).flatten(1))


class Unused(nn.Module):
    """Two parameters that the output does not depend on."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = mlp(), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


class Recurrent(nn.Module):
    def __init__(self, kind=nn.GRU):
        super().__init__()
        self.body, self.out = kind(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.body(x)[0][:, -1])
