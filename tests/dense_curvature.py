"""Dense curvature matrices of the one concatenated loss by double backward, never by torch.func."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradcond.curvature import Operator


def jacobian(ys, parameters):
    """(numel of y, n), one backward pass a row."""
    return torch.stack(
        [
            torch.cat(
                [
                    g.reshape(-1)
                    for g in torch.autograd.grad(y, parameters, retain_graph=True, materialize_grads=True)
                ]
            )
            if y.requires_grad
            else torch.zeros(sum(p.numel() for p in parameters), dtype=y.dtype)
            for y in ys.reshape(-1)
        ]
    ).detach()


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def hessian_of(evaluate, parameters):
    """The Hessian of a scalar function of nothing: evaluate() is the loss."""
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(evaluate(), parameters, create_graph=True, materialize_grads=True)
        return jacobian(torch.cat([g.reshape(-1) for g in gradient]), parameters)


def dense_hessian(model, loss_fn, input, target):
    return hessian_of(lambda: loss_fn(model(input), target), trainable(model))


def ggn_of(output, loss_of_output, parameters):
    J, m = jacobian(output, parameters), output.numel()
    bend = torch.autograd.functional.hessian(loss_of_output, output.detach())
    return J.mT @ bend.reshape(m, m) @ J


def dense_ggn(model, loss_fn, input, target):
    with sdpa_kernel(SDPBackend.MATH):
        return ggn_of(model(input), lambda z: loss_fn(z, target), trainable(model))


def assert_same_operator(operator, dense, relative=1e-12):
    largest = torch.linalg.eigvalsh((dense + dense.mT) / 2).abs().max()
    assert operator.shape == dense.shape
    error = (operator.to_dense().double() - dense).abs().max()
    assert error <= relative * largest, f"off by {error / largest:.1e} of the largest eigenvalue"
    root = operator.root(10_000) if isinstance(operator, Operator) else None
    if root is not None:
        rows = root.rows.double()
        error = (rows.mT @ (root.signs[:, None] * rows) - dense).abs().max()
        assert error <= 10 * relative * largest, f"its root is off by {error / largest:.1e}"


def split(input, target, sizes):
    return list(zip(input.split(sizes), target.split(sizes), strict=True))


def mlp():
    """A small network in eval mode, with running statistics."""
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).eval()


def problem(rows=6):
    """It, with inputs and targets."""
    return mlp(), torch.randn(rows, 4), torch.randint(0, 3, (rows,))
